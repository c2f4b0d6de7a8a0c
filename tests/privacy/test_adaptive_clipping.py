import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cedarjax import testing
from cedarjax.core import take_info
from cedarjax.privacy import adaptive_clipping, next_norm, split_noise
from tests.privacy import privacy_oracles as oracles


def lengths_to_rows(lengths):
    """`[C, 2]` rows of given lengths in different directions."""
    angles = np.arange(len(lengths)) * 0.7
    return jnp.asarray(np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1), jnp.float32)


def rounds(rule, rows_of, weights_of, num_rounds, seed=0):
    """The updates, the norms before each round and the last state."""
    state, outs, norms = rule.init(None), [], []
    step = jax.jit(lambda rows, state, weights, key: rule.update(rows, state, weights=weights, key=key))
    for i in range(num_rounds):
        norms.append(float(state.max_norm))
        out, state = step(rows_of(i), state, weights_of(i), jax.random.key(1000 * seed + i))
        state, _ = take_info(state)
        outs.append(np.asarray(out))
    return np.array(outs), np.array(norms), state


def test_several_rounds_against_numpy():
    """Without noise; the cohort and who is absent or broken change from round to round."""
    rng = np.random.default_rng(0)
    rows = [np.array(lengths_to_rows(rng.gamma(2.0, 1.0, 6))) for _ in range(12)]
    weights = [(rng.uniform(size=6) < 0.7).astype(np.float32) for _ in rows]
    rows[3][2] = np.nan
    weights[3][2] = 1
    rule = adaptive_clipping(
        0.0, 4.2, initial_norm=0.5, target_quantile=0.4, learning_rate=0.3, count_std=np.float32(0.0)
    )
    outs, norms, state = rounds(rule, lambda i: jnp.asarray(rows[i]), lambda i: jnp.asarray(weights[i]), 12)

    limit = 0.5
    for i in range(12):
        assert norms[i] == pytest.approx(limit, rel=1e-5)
        want = oracles.clipped_rows(rows[i], weights[i], limit).sum(axis=0) / 4.2
        np.testing.assert_allclose(outs[i], want, rtol=1e-4, atol=1e-6)
        present = (weights[i] > 0) & np.isfinite(rows[i]).all(axis=1)
        fits = np.linalg.norm(rows[i][present], axis=1) <= limit
        share = 0.5 + (fits - 0.5).sum() / 4.2
        limit *= np.exp(-0.3 * (share - 0.4))
    assert float(state.max_norm) == pytest.approx(limit, rel=1e-5)
    assert state.num_releases == 12


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_it_finds_the_quantile_under_poisson_sampling_and_noise(quantile):
    rng = np.random.default_rng(1)
    lengths = rng.gamma(2.0, 1.0, 200)
    rows = lengths_to_rows(lengths)
    coins = rng.uniform(size=(150, 200)) < 0.3
    rule = adaptive_clipping(1.0, 60.0, initial_norm=0.01, target_quantile=quantile)
    _, norms, _ = rounds(rule, lambda i: rows, lambda i: jnp.asarray(coins[i], jnp.float32), 150)
    reached = np.median(norms[-50:])
    assert quantile - 0.12 < (lengths <= reached).mean() < quantile + 0.12
    assert norms[0] == np.float32(0.01)


def test_the_noise_is_split():
    """Both releases together: `1/z^2` of the update plus `1/(2 sigma_b)^2` of the counts is that of the whole."""
    for z, sigma in ((1.0, 1.0), (0.3, 5.0), (4.0, 2.5)):
        assert split_noise(z, sigma) ** -2 + (2 * sigma) ** -2 == pytest.approx(z**-2)
        np.testing.assert_allclose(split_noise(jnp.float32(z), sigma), split_noise(z, sigma), rtol=1e-5)
    assert split_noise(0.0, 1.0) == 0


def test_the_noise_of_updates_and_counts_has_its_variance():
    rows, weights = lengths_to_rows(np.array([0.5, 0.7, 3.0])), jnp.ones(3)
    rule = adaptive_clipping(1.5, 5.0, initial_norm=1.0, learning_rate=1.0, target_quantile=0.0, count_std=2.0)

    def one(key):
        out, state = rule.update(rows, rule.init(None), weights=weights, key=key)
        return out, -jnp.log(state.max_norm)  # the noised share

    out, share = jax.vmap(one)(jax.random.split(jax.random.key(0), 4096))
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 4096)
    std = 1.5 / np.sqrt(1 - (1.5 / 4) ** 2)  # as written in the paper
    bare = oracles.clipped_rows(rows, weights, 1.0).sum(axis=0) / 5
    noise = (np.asarray(out, np.float64) - bare) * 5 / std
    assert ((noise**2).sum(axis=0) > low).all() and ((noise**2).sum(axis=0) < high).all()
    of_counts = (np.asarray(share, np.float64) - (0.5 + 0.5 / 5)) * 5 / 2.0
    assert low < (of_counts**2).sum() < high
    assert abs(np.corrcoef(of_counts, noise[:, 0])[0, 1]) < 5 / np.sqrt(4096)


def test_one_client_moves_the_count_by_one_half():
    """Added, removed, too long or broken: what is noised changes by 1/2 at most, as the split takes for granted."""
    rule = adaptive_clipping(
        0.0, 1.0, initial_norm=1.0, learning_rate=1.0, target_quantile=0.0, count_std=np.float32(0)
    )

    def count(lengths, weights):
        _, state = rule.update(
            lengths_to_rows(lengths), rule.init(None), weights=jnp.asarray(weights), key=jax.random.key(0)
        )
        return -float(jnp.log(state.max_norm)) - 0.5

    for length in (0.5, 2.0, np.nan):
        lengths = np.array([0.5, 2.0, 2.0, length])
        change = count(lengths, [1.0, 1.0, 1.0, 1.0]) - count(lengths, [1.0, 1.0, 1.0, 0.0])
        assert change == pytest.approx({0.5: 0.5, 2.0: -0.5}.get(length, 0.0), abs=1e-5)


def test_defaults_are_the_papers_unless_they_cannot_be():
    """`sigma_b = m / 20` where that is much more than the noise, else twice the noise."""
    for z, m, sigma in ((1.0, 400.0, 20.0), (1.0, 10.0, 2.0), (0.0, 10.0, 0.5)):
        rule = adaptive_clipping(z, m, initial_norm=1.0)
        out, state = rule.update(jnp.zeros((1, 2)), rule.init(None), weights=jnp.ones(1), key=jax.random.key(0))
        assert float(state.info.noise_std) * m == pytest.approx(split_noise(z, sigma), rel=1e-5)

        def one(z, m=m):
            rule = adaptive_clipping(z, m, initial_norm=1.0)
            return rule.update(jnp.zeros((1, 2)), rule.init(None), weights=jnp.ones(1), key=jax.random.key(0))[0]

        traced = jax.jit(one)(jnp.float32(z))
        np.testing.assert_allclose(traced, out, rtol=1e-4)


def test_the_norm_stays_when_the_budget_is_spent():
    rule = adaptive_clipping(1.0, 2.0, initial_norm=1.0, num_rounds=1)
    outs, norms, state = rounds(rule, lambda i: lengths_to_rows(np.array([0.1, 0.2])), lambda i: jnp.ones(2), 3)
    assert outs[0].any() and not outs[1:].any()
    assert norms[1] != norms[0] and norms[2] == norms[1] == float(state.max_norm) and state.num_releases == 1


def test_a_step():
    np.testing.assert_allclose(next_norm(jnp.float32(2.0), jnp.float32(0.9), 0.5, 0.2), 2 * np.exp(-0.08), rtol=1e-6)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"noise_multiplier": 2.0, "count_std": 1.0}, "2 \\* count_std > noise_multiplier.*got 1.0 and 2.0"),
        ({"target_quantile": 1.2}, "target_quantile must satisfy 0 <= target_quantile <= 1, got 1.2"),
        ({"learning_rate": 0}, "learning_rate must be above 0 and finite, got 0"),
        ({"initial_norm": -1.0}, "initial_norm must be above 0 and finite, got -1.0"),
        ({"count_std": 0.0}, "count_std must be above 0 and finite, got 0.0"),
        ({"expected_cohort": 0.0}, "expected_cohort must be above 0"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        adaptive_clipping(**{"noise_multiplier": 1.0, "expected_cohort": 10.0, **changed})


def test_the_same_is_refused_as_with_a_fixed_norm():
    rule, rows = adaptive_clipping(1.0, 1.0), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="key must be given"):
        rule.update(rows, rule.init(None), weights=jnp.ones(2))
    with pytest.raises(ValueError, match="client axis"):
        rule.update(rows[0], rule.init(None), jnp.ones(3), weights=jnp.ones(2), key=jax.random.key(0))


@pytest.mark.parametrize("law", ["agrees_without_jit", "ignores_order", "ignores_absent_clients", "traces_once"])
def test_laws(law):
    rng = np.random.default_rng(2)
    updates = {
        "a": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=5), jnp.float32),
    }
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    rule = adaptive_clipping(0.5, 5.0, initial_norm=1.0)
    testing.AGGREGATOR_LAWS[law](testing.AggregatorCase(rule, updates, params, jnp.arange(1.0, 6.0)))
