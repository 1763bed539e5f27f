"""Devices: the only room that asks which there are.

For now a run uses the default device of its process. What is rarely read and large, the average of
the parameters, lives in that device's host memory (§3.2.3).
"""

from dataclasses import replace

import jax

from dsv3.config import Config
from dsv3.numerics.dot import placed


def on_this_platform(config: Config) -> Config:
    """`config` with the choices made that it leaves to the platform: the backend of its dot rule.

    Runs are written down with the choice left open, so that they go on elsewhere as well.
    """
    dot = placed(config.model.dot, platform())
    return replace(config, model=replace(config.model, dot=dot))


def host_sharding() -> jax.sharding.Sharding:
    """Placement in the pinned host memory of the default device."""
    device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the default devices are."""
    return jax.default_backend()
