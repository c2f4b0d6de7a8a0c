"""Strengths tried in the space of inner products are judged as on rows that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj

NUM_CLIENTS, F = 9, 2
RULES = {
    "multi_krum": lambda: cj.robust.multi_krum(F),
    "nnm": lambda: cj.robust.nnm(F, cj.robust.krum(F)),
    "clip": lambda: cj.robust.clip(3.0, cj.robust.multi_krum(F)),
    "too_few": lambda: cj.robust.krum(F),
}
ATTACKS = {"alie": cj.attacks.optimised_alie, "ipm": cj.attacks.optimised_ipm, "fang": cj.attacks.fang}


def silent(rule):
    """The same rule, which tells nothing, so that candidates are written out."""

    def update(*args, **kwargs):
        out, state = rule.update(*args, **kwargs)
        return out, state._replace(info=None)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def make_updates():
    rng = np.random.default_rng(3)
    shapes = {"a": (4, 5), "b": (7,)}
    return {k: jnp.asarray(0.3 + rng.normal(size=(NUM_CLIENTS, *s)), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, attack",
    [
        ("nnm", "alie"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("multi_krum", "fang"), ("clip", "ipm"))),
        pytest.param("too_few", "alie", marks=pytest.mark.slow),
    ],
)
def test_strength_and_objective_agree(rule, attack):
    updates, byzantine = make_updates(), jnp.arange(NUM_CLIENTS) >= NUM_CLIENTS - F
    # Three absent clients leave too few for Krum, so that the rule falls back and tells no coefficients that count.
    weights = jnp.ones(NUM_CLIENTS).at[:3].set(0.0 if rule == "too_few" else 1.0)
    params = jax.tree.map(lambda x: x[0], updates)
    found = []
    for known in (RULES[rule](), silent(RULES[rule]())):
        transform = ATTACKS[attack](known)
        run = jax.jit(lambda u, t=transform: t.update(u, t.init(params), byzantine=byzantine, weights=weights))
        poisoned, state = run(updates)
        found.append((poisoned, state.info))
    (got, got_info), (want, want_info) = found
    np.testing.assert_allclose(got_info.strength, want_info.strength, rtol=1e-5)
    np.testing.assert_allclose(got_info.objective, want_info.objective, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert float(got_info.objective) > 0


@pytest.mark.slow
def test_layer_masks_are_tried_on_written_rows():
    updates, byzantine = make_updates(), jnp.arange(NUM_CLIENTS) >= NUM_CLIENTS - F
    weights = {"a": jnp.ones(NUM_CLIENTS).at[1].set(0.0), "b": jnp.ones(NUM_CLIENTS)}
    transform = cj.attacks.optimised_alie(cj.robust.multi_krum(F), strengths=(0.0, 1.0, 4.0), num_refinements=0)
    params = jax.tree.map(lambda x: x[0], updates)
    _, state = transform.update(updates, transform.init(params), byzantine=byzantine, weights=weights)
    quiet = cj.attacks.optimised_alie(silent(cj.robust.multi_krum(F)), strengths=(0.0, 1.0, 4.0), num_refinements=0)
    _, want = quiet.update(updates, quiet.init(params), byzantine=byzantine, weights=weights)
    np.testing.assert_allclose(state.info.objective, want.info.objective, rtol=1e-6)
