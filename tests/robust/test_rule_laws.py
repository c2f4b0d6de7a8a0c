"""Every rule against every law of an aggregator, and what a sub-cohort decides; a new rule gets all by one row."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import robust, testing
from cedarjax.testing.aggregators import _aggregate

NUM_CLIENTS = 8  # as many on every device of the mesh, and enough for Bulyan
SHAPES = {"a": (3, 4), "b": {"c": (4,)}}
BOTH = ("translation", "scale")

ORDER = {"ignores_order": "clients are dealt by their places"}
TIES = {"ignores_order": "two that are each other's only neighbour tie, and the first is taken"}
PLACE = {
    "ignores_order": "the trusted client is named by its place",
    "ignores_absent_clients": "so is it there",
    "ignores_nonfinite_clients": "so is it there",
}
HISTORY = {"traces_once": "the histories are made in the first round; see foolsgold_of_known_size"}
KNOWN_SIZE = {
    "ignores_absent_clients": "the number of clients is fixed",
    "ignores_nonfinite_clients": "the number of clients is fixed",
    "survives_few_clients": "the number of clients is fixed",
}


class Row(NamedTuple):
    """A rule, what it moves along with, and the laws that its definition breaks, with the reason."""

    make: Callable[[], Any]
    equivariances: tuple[str, ...] = ()
    exempt: dict[str, str] = {}


def draw(rng, count):
    shape = lambda s: (count, *s)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=shape(s)), jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


def server_update():
    return jax.tree.map(lambda x: x.mean(axis=0), draw(np.random.default_rng(1), 5))


def distance_to_a_third(params, batch, key):
    del batch, key
    return sum(jnp.square(x.astype(jnp.float32) - 0.3).sum() for x in jax.tree.leaves(params))


RULES = {
    "median": Row(robust.median, BOTH),
    "trimmed_mean": Row(lambda: robust.trimmed_mean(2), BOTH),
    "meamed": Row(lambda: robust.meamed(2), BOTH),
    "phocas": Row(lambda: robust.phocas(2), BOTH),
    "krum": Row(lambda: robust.krum(1), BOTH),
    "multi_krum": Row(lambda: robust.multi_krum(2), BOTH),
    "bulyan": Row(lambda: robust.bulyan(1), BOTH, TIES),
    "sign_majority": Row(robust.sign_majority),
    "rlr": Row(lambda: robust.rlr(3)),
    "rsa": Row(lambda: robust.rsa(0.1)),
    "centered_clipping": Row(lambda: robust.centered_clipping(1.0)),
    "centered_clipping_thrice": Row(lambda: robust.centered_clipping(1.0, 3)),
    "fltrust": Row(lambda: robust.fltrust(server_update())),
    "foolsgold": Row(robust.foolsgold, (), HISTORY),
    "foolsgold_of_known_size": Row(lambda: robust.foolsgold(num_clients=NUM_CLIENTS), (), KNOWN_SIZE),
    "zeno": Row(lambda: robust.zeno(2, distance_to_a_third, jnp.zeros(1))),
    "geometric_median": Row(lambda: robust.geometric_median(num_iters=20), BOTH),
    "geometric_median_from_zero": Row(lambda: robust.geometric_median(0.1, 3, "zero")),
    "autogm": Row(lambda: robust.autogm(num_iters=10, num_rounds=3), ("translation",)),
    "mda": Row(lambda: robust.mda(2), BOTH),
    "smea": Row(lambda: robust.smea(2), BOTH),
    "caf": Row(lambda: robust.caf(2), BOTH),
    "monna": Row(lambda: robust.monna(2, 0), BOTH, PLACE),
    "cge": Row(lambda: robust.cge(2), ("scale",)),
    "norm_clip": Row(lambda: robust.norm_clip(2.0)),
    "dnc": Row(lambda: robust.dnc(2), BOTH),
    "dnc_of_some": Row(lambda: robust.dnc(1, 2, 8), BOTH),
    "nnm_krum": Row(lambda: robust.nnm(2, robust.krum(1)), BOTH),
    "nnm_trimmed_mean": Row(lambda: robust.nnm(2, robust.trimmed_mean(2)), BOTH),
    "bucketing_median": Row(lambda: robust.bucketing(2, robust.median()), BOTH, ORDER),
    "arc_multi_krum": Row(lambda: robust.arc(2, robust.multi_krum(2)), ("scale",)),
    "clip_nnm_clipping": Row(lambda: robust.clip(3.0, robust.nnm(1, robust.centered_clipping(1.0)))),
}


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's. What it compiles for a user is compared with the definitions elsewhere."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def rolled_loops():
    """One row a pass of the loops over rows: the same numbers, and a fraction of the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cedarjax.robust.quantiles._UNROLLED", 1)
        yield


@functools.cache
def case(name, mesh):
    """One case a rule, so that its laws share what they compile."""
    rng = np.random.default_rng(0)
    updates = draw(rng, NUM_CLIENTS)
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    weights = jnp.asarray(rng.uniform(1.0, 9.0, NUM_CLIENTS), jnp.float32)
    return testing.AggregatorCase(RULES[name].make(), updates, params, weights, mesh, (jnp.bfloat16, jnp.float64))


# Second rows of a rule, and nests run without jit: what they would find, a first row finds.
VARIANTS = ("centered_clipping_thrice", "geometric_median_from_zero", "dnc_of_some", "clip_nnm_clipping")
NESTS = ("nnm_krum", "nnm_trimmed_mean", "bucketing_median", "arc_multi_krum", "multi_krum", "phocas")


def marks(name, law):
    return [pytest.mark.slow] if name in VARIANTS or (name in NESTS and law == "agrees_without_jit") else []


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        pytest.param(name, law, marks=marks(name, law))
        for name, row in RULES.items()
        for law in testing.AGGREGATOR_LAWS
        if law not in row.exempt
    ],
)
def test_rule(rule, law, mesh):
    testing.AGGREGATOR_LAWS[law](case(rule, mesh))


@pytest.mark.parametrize(("rule", "way"), [(name, way) for name, row in RULES.items() for way in row.equivariances])
def test_rule_goes_along(rule, way, mesh):
    testing.EQUIVARIANCES[way](case(rule, mesh))


def draw_rows(kind, rng):
    """Updates of the usual shapes that rules find hard to tell apart, or to bear."""
    normal = np.concatenate(
        [np.asarray(x).reshape(NUM_CLIENTS, -1) for x in jax.tree.leaves(draw(rng, NUM_CLIENTS))], 1
    )
    flat = {
        "normal": normal,
        "offset": 300 + normal,
        "far": normal * np.where(np.arange(NUM_CLIENTS) % 5 == 1, 1e7, 1.0)[:, None],
        "overflowing": np.where(np.arange(NUM_CLIENTS)[:, None] == rng.integers(NUM_CLIENTS), 1e30, normal),
        "tiny": 1e-30 * normal,
        "duplicates": np.round(2 * normal)[rng.integers(0, 3, NUM_CLIENTS)],
        "equal": np.tile(normal[:1], (NUM_CLIENTS, 1)),
        "zeros": 0 * normal,
    }[kind].astype(np.float32)
    return {"a": jnp.asarray(flat[:, :12].reshape(-1, 3, 4)), "b": {"c": jnp.asarray(flat[:, 12:])}}


GENERIC, DEGENERATE = ["normal", "offset", "far", "overflowing"], ["tiny", "duplicates", "equal", "zeros"]


@pytest.mark.parametrize("rule", RULES)
@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.integers(0, 10_000), st.sampled_from(GENERIC + DEGENERATE), st.integers(0, NUM_CLIENTS), st.booleans()
)
def test_hard_rows(rule, seed, kind, num_present, weighted):
    """Finite, whoever is present; and who is absent changes nothing, however many are left."""
    rng = np.random.default_rng(seed)
    there = rng.permutation(NUM_CLIENTS) < num_present
    weights = there * (rng.integers(1, 4, NUM_CLIENTS) if weighted else 1.0)
    drawn = case(rule, None)._replace(updates=draw_rows(kind, rng), weights=jnp.asarray(weights, jnp.float32))
    out, infos = _aggregate(drawn, drawn.updates, drawn.weights)
    testing.cases.finite("result", out)
    testing.cases.finite("infos", infos)
    if kind in GENERIC and "ignores_absent_clients" not in RULES[rule].exempt:
        scale = 300.0 if kind == "offset" else 1.0
        testing.AGGREGATOR_LAWS["ignores_absent_clients"](drawn._replace(atol=2e-5 * scale, rtol=1e-3))


FAR = {
    "rlr": "the mean, whatever its signs",
}
BY_LAYER = [
    *("krum", "bulyan", "centered_clipping", "centered_clipping_thrice", "fltrust", "foolsgold", "zeno"),
    *("nnm_krum", "bucketing_median", "arc_multi_krum", "clip_nnm_clipping"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "layered"), [(name, False) for name in RULES if name not in FAR] + [(name, True) for name in BY_LAYER]
)
def test_a_row_whose_square_overflows_decides_nothing(rule, layered):
    """It is finite, and rules that square lengths cannot bear it."""
    drawn = case(rule, None)
    updates = jax.tree.map(lambda x: x.at[3].set(1e30), drawn.updates)
    weights = jax.tree.map(lambda _: drawn.weights, updates) if layered else drawn.weights
    out, _ = _aggregate(drawn, updates, weights)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(out)) < 10
