"""AdamW as the report runs it (§4.2, §3.3.3): optax, with both moments stored in BF16.

Weight decay acts on every matrix, embedding and head included, and on no norm gain: the report
does not say, this is the usual reading. The router's bias is no parameter and never comes here.
The learning rate is applied by the step, which knows the tokens consumed.
"""

import jax
import jax.numpy as jnp
import optax

from dsv3.config import AdamW


def adamw(config: AdamW) -> optax.GradientTransformation:
    """Updates to be multiplied by minus the learning rate; gradients arrive clipped, in FP32."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.chain(
        stored_in(adam, jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def stored_in(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """`inner` with its floating-point state kept in `dtype` between steps, updated in FP32."""

    def cast(state, to):
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def update(updates, state, params=None, **_):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def decays(params) -> object:
    """The tree of `params` with True where weight decay acts: everywhere but on norm gains."""

    def is_matrix(path, _):
        return not any(getattr(entry, "key", None) == "gain" for entry in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
