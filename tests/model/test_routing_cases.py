"""Routing conformance: hand-made cases with one right answer each, that the usual mistakes fail.

`routing_cases.json` holds scores, biases and loads with the gates, counts and biases that must come
out. `Right*` are the rules written out in numpy; each of their subclasses makes one mistake that
was made somewhere. A case names the mistakes it catches, and both are tested: that ours and the
rules pass every case, that each mistake fails the cases which say so, and that none goes uncaught.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3.config import Model, Moe
from dsv3.model.router import Router, updated_bias
from dsv3.parallel.dispatch import count

CASES = json.loads(Path(__file__).with_name("routing_cases.json").read_text("utf-8"))


def cases(kind):
    return pytest.mark.parametrize("case", CASES[kind], ids=lambda case: case["name"])


# --- ours --------------------------------------------------------------------------------------


@cases("selection")
def test_router_selects(case):
    """The whole router: identity weights turn logits into the scores of the case."""
    moe = Moe(
        routed_experts=case["experts"],
        experts_per_token=case["chosen"],
        groups=case["groups"],
        groups_per_token=case["kept"],
        group_score_experts=min(2, case["experts"] // case["groups"]),
        gate_scale=case.get("scale", 2.5),
        normalize_gates=case.get("normalize", True),
    )
    router = Router(jax.random.key(0), Model(width=case["experts"], moe=moe))
    router.w[...] = jnp.eye(case["experts"])
    router.bias[...] = jnp.array(case["bias"])
    logits_BTD = logits(case)[None].astype(np.float32)
    routing = jax.jit(Router.__call__)(router, logits_BTD, np.ones(logits_BTD.shape[:2], bool))
    chosen_XK, gates_XK = np.asarray(routing.experts_XK), np.asarray(routing.gates_XK)
    assert same_gates([by_expert(*row) for row in zip(chosen_XK, gates_XK, strict=True)], case)


@cases("counts")
def test_router_counts(case):
    @jax.jit
    def counted_twice(x, choices, valid):
        def layer(x):
            return x * x, count(choices, case["experts"], valid)

        (_, pullback, counts) = jax.vjp(jax.checkpoint(layer), x, has_aux=True)
        return counts, pullback(x)

    counts, _ = counted_twice(1.0, np.array(case["choices"]), np.array(case["valid"]))
    np.testing.assert_array_equal(counts, case["counts"])


@cases("bias")
def test_bias_moves(case):
    counts_LE = jnp.array(case["micro_batches"]).sum(axis=0)[None]
    moved_LE = updated_bias(jnp.array([case["before"]]), counts_LE, case["speed"])
    assert same_bias(moved_LE[0], case)


def logits(case):
    scores = np.array(case["scores"])
    return np.log(scores / (1 - scores))


def by_expert(chosen_K, gates_K):
    return dict(zip(map(str, chosen_K), gates_K, strict=True))


def same_gates(gates, case):
    """Experts and gates of every token, whatever their order; gates to FP32 accuracy."""

    def same(mine, right):
        return mine.keys() == right.keys() and np.allclose(
            list(mine.values()), [right[expert] for expert in mine], rtol=1e-5, atol=0
        )

    return len(gates) == len(case["gates"]) and all(map(same, gates, case["gates"]))


def same_bias(bias, case):
    return np.allclose(bias, case["after"], rtol=0, atol=1e-6)


# --- the rules, and the mistakes ---------------------------------------------------------------


class RightSelection:
    """Eq. 13, 15, 16 with group-limited selection; parts as methods, to be mistaken one by one."""

    mask = -np.inf
    epsilon = 1e-20

    def passes(self, case):
        return same_gates(self.route(case), case)

    def route(self, case):
        self.case = case
        scores_XE = self.affinity(np.array(case["scores"]))
        bias_E = self.bias(np.array(case["bias"]))
        members_GI = self.groups(np.arange(case["experts"]))
        kept = self.kept(scores_XE, bias_E, members_GI)
        gates = []
        for s_E, mine in zip(scores_XE, kept, strict=True):
            biased_E = self.masked(s_E + bias_E, np.isin(np.arange(case["experts"]), mine))
            chosen = self.best(biased_E, case["chosen"])
            gates.append(by_expert(chosen, self.gates(s_E, bias_E, chosen)))
        return gates

    def affinity(self, scores_XE):
        return scores_XE

    def bias(self, bias_E):
        return bias_E

    def groups(self, expert_E):
        return expert_E.reshape(self.case["groups"], -1)

    def kept(self, scores_XE, bias_E, members_GI):
        worth_XG = [[self.worth(s_E, bias_E, mine) for mine in members_GI] for s_E in scores_XE]
        return [members_GI[self.best(np.array(w), self.case["kept"])].ravel() for w in worth_XG]

    def worth(self, s_E, bias_E, mine):
        return np.sort((s_E + bias_E)[mine])[-2:].sum()

    def masked(self, biased_E, allowed_E):
        return np.where(allowed_E, biased_E, self.mask)

    def best(self, x, k):
        return np.argsort(-x, kind="stable")[:k]

    def gates(self, s_E, bias_E, chosen):
        gates = s_E[chosen]
        if self.normalised():
            gates = gates / (gates.sum() + self.epsilon)
        return gates * self.scale()

    def normalised(self):
        return self.case.get("normalize", True)

    def scale(self):
        return self.case.get("scale", 2.5)


class BiasedGates(RightSelection):
    def gates(self, s_E, bias_E, chosen):
        return super().gates(s_E + bias_E, bias_E, chosen)


class NoBias(RightSelection):
    def bias(self, bias_E):
        return 0 * bias_E


class SoftmaxAffinity(RightSelection):
    def affinity(self, scores_XE):
        odds_XE = scores_XE / (1 - scores_XE)
        return odds_XE / odds_XE.sum(axis=-1, keepdims=True)


class UnnormalisedGates(RightSelection):
    def normalised(self):
        return False


class AlwaysNormalised(RightSelection):
    def normalised(self):
        return True


class NormalisedOverAll(RightSelection):
    def gates(self, s_E, bias_E, chosen):
        return s_E[chosen] / s_E.sum() * self.scale()


class UnscaledGates(RightSelection):
    def scale(self):
        return 1.0


class LargeEpsilon(RightSelection):
    epsilon = 1e-6


class ZeroMask(RightSelection):
    mask = 0.0


class ZeroMaskByProduct(RightSelection):
    def masked(self, biased_E, allowed_E):
        return biased_E * allowed_E


class BestOfGroup(RightSelection):
    def worth(self, s_E, bias_E, mine):
        return (s_E + bias_E)[mine].max()


class WholeGroup(RightSelection):
    def worth(self, s_E, bias_E, mine):
        return (s_E + bias_E)[mine].sum()


class UnbiasedGroups(RightSelection):
    def worth(self, s_E, bias_E, mine):
        return super().worth(s_E, 0 * bias_E, mine)


class NoGroups(RightSelection):
    def kept(self, scores_XE, bias_E, members_GI):
        return [members_GI.ravel()] * len(scores_XE)


class OneGroupForAllTokens(RightSelection):
    def kept(self, scores_XE, bias_E, members_GI):
        return super().kept(scores_XE[:1].repeat(len(scores_XE), axis=0), bias_E, members_GI)


class StridedGroups(RightSelection):
    def groups(self, expert_E):
        return expert_E.reshape(-1, self.case["groups"]).T


class TiesToTheHigherIndex(RightSelection):
    def best(self, x, k):
        return np.argsort(x, kind="stable")[::-1][:k]


class Bf16Bias(RightSelection):
    def bias(self, bias_E):
        return bias_E.astype(ml_dtypes.bfloat16).astype(float)


class Bf16Scores(RightSelection):
    def affinity(self, scores_XE):
        return scores_XE.astype(ml_dtypes.bfloat16).astype(float)


class RightCounts:
    def passes(self, case):
        return np.array_equal(self.count(case), case["counts"])

    def count(self, case) -> np.ndarray:
        choices = np.array(case["choices"])[np.array(case["valid"])]
        return np.bincount(choices.ravel(), minlength=case["experts"])


class CountsTokens(RightCounts):
    def count(self, case):
        return super().count(case) / len(case["choices"][0])


class CountsPadding(RightCounts):
    def count(self, case):
        return super().count(case | {"valid": [True] * len(case["valid"])})


class CountsEveryPass(RightCounts):
    """A counter beside the layer, which the recomputed layer finds and raises again."""

    def count(self, case):
        return super().count(case) * case["passes"]


class RightBias:
    def passes(self, case):
        return same_bias(self.move(case), case)

    def move(self, case):
        before, loads = np.array(case["before"]), np.array(case["micro_batches"])
        return before + case["speed"] * self.direction(loads.sum(axis=0))

    def direction(self, load_E):
        return np.sign(load_E.mean() - load_E)


class WrongSign(RightBias):
    def direction(self, load_E):
        return -super().direction(load_E)


class Proportional(RightBias):
    def direction(self, load_E):
        return load_E.mean() - load_E


class AgainstTheMedian(RightBias):
    def direction(self, load_E):
        return np.sign(np.median(load_E) - load_E)


class IntegerMean(RightBias):
    def direction(self, load_E):
        return np.sign(load_E.sum() // len(load_E) - load_E)


class AlwaysMoves(RightBias):
    def direction(self, load_E):
        return np.where(load_E > load_E.mean(), -1, 1)


class DeadZone(RightBias):
    def direction(self, load_E):
        gap = load_E.mean() - load_E
        return np.sign(gap) * (np.abs(gap) > 0.01 * load_E.mean())


class KeepsOldBias(RightBias):
    def move(self, case):
        return super().move(case) - np.array(case["before"])


class AlwaysRecentred(RightBias):
    def move(self, case):
        moved = super().move(case)
        return moved - moved.mean()


class IgnoresSpeed(RightBias):
    def move(self, case):
        return super().move(case | {"speed": 0.001})


class EveryMicroBatch(RightBias):
    """An update in every forward pass: the sum of signs."""

    def move(self, case):
        moves = [case["speed"] * self.direction(np.array(load)) for load in case["micro_batches"]]
        return np.array(case["before"]) + np.sum(moves, axis=0)


class LastMicroBatch(RightBias):
    """Counts overwritten by each micro-batch."""

    def move(self, case):
        return super().move(case | {"micro_batches": case["micro_batches"][-1:]})


RULES = {"selection": RightSelection, "counts": RightCounts, "bias": RightBias}
MISTAKES = [(kind, m) for kind, right in RULES.items() for m in right.__subclasses__()]


@pytest.mark.parametrize("kind", RULES)
def test_the_rules_written_out_pass(kind):
    assert [case["name"] for case in CASES[kind] if not RULES[kind]().passes(case)] == []


@pytest.mark.parametrize(("kind", "mistake"), MISTAKES, ids=lambda m: getattr(m, "__name__", m))
def test_the_table_catches(kind, mistake):
    failed = {case["name"] for case in CASES[kind] if not mistake().passes(case)}
    promised = {case["name"] for case in CASES[kind] if mistake.__name__ in case["catches"]}
    assert promised and promised <= failed


def test_the_table_names_no_unknown_mistake():
    named = {name for kind in RULES for case in CASES[kind] for name in case["catches"]}
    assert named == {mistake.__name__ for _, mistake in MISTAKES}
