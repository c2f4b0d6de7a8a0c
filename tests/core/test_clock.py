import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import core


def draw(duration_fn, num=4000, client=0):
    keys = jax.random.split(jax.random.key(1), num)
    return np.asarray(jax.jit(jax.vmap(lambda key: duration_fn(key, jnp.int32(client), jnp.int32(0))))(keys))


def test_means_of_the_samplers():
    """Standard errors at 4,000 draws are below 3 % of the mean."""
    means = jnp.array([1.0, 20.0])
    for fn, want in (
        (core.exponential_durations(means), 20.0),
        (core.lognormal_durations(means, 0.8), 20.0),
        (core.shifted_exponential_durations(5.0, means), 25.0),
        (core.shifted_exponential_durations(jnp.array([1.0, 4.0]), means), 24.0),
    ):
        got = draw(fn, client=1)
        np.testing.assert_allclose(got.mean(), want, rtol=0.08)
        assert got.min() >= 0 and got.dtype == np.float32
    assert draw(core.shifted_exponential_durations(5.0, means), client=1).min() >= 5
    np.testing.assert_allclose(np.log(draw(core.lognormal_durations(3.0, 0.8))).std(), 0.8, rtol=0.05)
    np.testing.assert_allclose(draw(core.exponential_durations(3.0)).std(), 3.0, rtol=0.1)


def test_fixed_durations():
    fn = core.fixed_durations(jnp.array([2, 7]))
    assert draw(fn, 5, 1).tolist() == [7.0] * 5
    assert draw(core.fixed_durations(3.0), 2).tolist() == [3.0, 3.0]
    np.testing.assert_allclose(draw(core.lognormal_durations(2.5, 0.0), 3), 2.5)


def test_durations_in_float64(x64):
    fn = core.exponential_durations(jnp.array([1e-9], jnp.float64))
    assert fn(jax.random.key(0), jnp.int32(0), jnp.int32(0)).dtype == jnp.float64


def test_a_synchronous_round_waits_for_the_slowest():
    """Against a Python loop; absent clients, some never done, are not waited for."""
    rng = np.random.default_rng(0)
    durations = rng.uniform(1, 9, size=(6, 5)).astype(np.float32)
    weights = rng.integers(0, 3, size=(6, 5)).astype(np.float32)
    durations[weights == 0] = np.inf
    durations[1], weights[1] = np.nan, 0.0
    for deadline in (None, 4.0):
        elapsed = 0.0
        got = core.synchronous_time(jnp.asarray(durations), jnp.asarray(weights), deadline=deadline)
        for r in range(6):
            taken = [d for d, w in zip(durations[r], weights[r], strict=True) if w > 0]
            seconds = max(taken, default=0.0) if deadline is None else min(max(taken, default=0.0), deadline)
            elapsed += seconds
            np.testing.assert_allclose(got.seconds[r], seconds, rtol=1e-6)
            np.testing.assert_allclose(got.elapsed[r], elapsed, rtol=1e-6)
            want = (weights[r] > 0) & (durations[r] <= (deadline or np.inf))
            np.testing.assert_array_equal(got.in_time[r], want)


def test_somebody_who_never_comes():
    durations, weights = jnp.array([[1.0, jnp.nan], [1.0, 2.0]]), jnp.ones((2, 2))
    got = core.synchronous_time(durations, weights)
    assert got.elapsed.tolist() == [np.inf, np.inf] and got.in_time.tolist() == [[True, False], [True, True]]
    got = core.synchronous_time(durations, weights, deadline=5.0)
    assert got.elapsed.tolist() == [5.0, 7.0]
    swept = jax.vmap(lambda d: core.synchronous_time(durations, weights, deadline=d).elapsed)(jnp.array([1.5, 5.0]))
    assert swept.tolist() == [[1.5, 3.0], [5.0, 7.0]]


def test_time_to_target():
    times = jnp.arange(1.0, 6.0)
    accuracy = jnp.array([0.1, 0.5, jnp.nan, 0.7, 0.6])
    assert [float(core.time_to_target(times, accuracy, t)) for t in (0.0, 0.5, 0.6, 0.9)] == [1, 2, 4, np.inf]
    assert core.time_to_target(times, accuracy, 0.3, lower_is_better=True) == 1
    assert core.time_to_target(times, 1 - accuracy, 0.35, lower_is_better=True) == 4
    seeds = core.time_to_target(jnp.stack([times, 2 * times]), jnp.stack([accuracy, accuracy]), 0.6)
    assert seeds.tolist() == [4, 8]
    assert core.time_to_target(jnp.zeros(0), jnp.zeros(0), 0.5) == np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.fixed_durations(jnp.ones((2, 2))), r"seconds must be a scalar or \[N\], got the shape \(2, 2\)"),
        (lambda: core.exponential_durations(jnp.ones((1, 1))), r"mean must be a scalar or \[N\]"),
        (lambda: core.lognormal_durations(1.0, -0.1), "sigma must be at least 0, got -0.1"),
        (
            lambda: core.synchronous_time(jnp.ones((2, 3)), jnp.ones(3)),
            r"must both be \[R, C\], got \(2, 3\) and \(3,\)",
        ),
        (
            lambda: core.synchronous_time(jnp.ones((2, 3)), jnp.ones((2, 3)), deadline=0.0),
            "deadline must be above 0, got 0.0",
        ),
        (lambda: core.time_to_target(jnp.ones(3), jnp.ones(2), 0.5), r"same shape \[..., R\], got \(3,\) and \(2,\)"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
