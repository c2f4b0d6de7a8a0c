import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj

LATE = jnp.arange(6, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("staleness_fn", "by_hand"),
    [
        (cj.server.constant(), [1, 1, 1, 1, 1, 1]),
        (cj.server.polynomial(1.0), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        (cj.server.polynomial(0.5), [1, 0.70710678, 0.57735027, 0.5, 0.4472136, 0.40824829]),
        (cj.server.polynomial(0.0), [1, 1, 1, 1, 1, 1]),
        (cj.server.hinge(2.0, 2.0), [1, 1, 1, 1 / 3, 1 / 5, 1 / 7]),
        (cj.server.hinge(10.0, 4.0), [1, 1, 1, 1, 1, 1 / 11]),
        (cj.server.hinge(0.1, 4.0), [1, 1, 1, 1, 1, 1 / 1.1]),
        (cj.server.exponential(float(np.log(2))), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
    ],
)
def test_coefficients_by_hand(staleness_fn, by_hand):
    got = staleness_fn(LATE)
    np.testing.assert_allclose(got, by_hand, rtol=1e-6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(jax.vmap(staleness_fn)(LATE), got, rtol=1e-6)


@pytest.mark.parametrize("a", [0.05, 0.5, 3.0])
def test_never_above_one_and_never_rising(a):
    """The published hinge, `1 / (a (d - b))`, is 20 at the first step for a = 0.05."""
    late = jnp.arange(200, dtype=jnp.int32)
    for fn in (cj.server.polynomial(a), cj.server.hinge(a, 3.0), cj.server.exponential(a)):
        got = np.asarray(fn(late))
        assert got[0] == 1 and (got <= 1).all() and (np.diff(got) <= 0).all() and np.isfinite(got).all()


def test_a_staleness_below_zero_counts_as_zero():
    for fn in (cj.server.polynomial(0.5), cj.server.hinge(1.0, 0.0), cj.server.exponential(1.0), cj.server.constant()):
        assert fn(jnp.int32(-7)) == 1


def test_decays_can_be_swept():
    got = jax.vmap(lambda a, b: cj.server.hinge(a, b)(jnp.int32(5)))(jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(got, [1 / 4, 1 / 3], rtol=1e-6)
    got = jax.vmap(lambda a: cj.server.polynomial(a)(jnp.int32(3)) * cj.server.exponential(a)(jnp.int32(1)))(
        jnp.array([0.5, 1.0])
    )
    np.testing.assert_allclose(got, [0.5 * np.exp(-0.5), 0.25 * np.exp(-1.0)], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cj.server.polynomial(-1.0), "a must be at least 0, got -1.0"),
        (lambda: cj.server.exponential(-0.5), "a must be at least 0, got -0.5"),
        (lambda: cj.server.hinge(1.0, -2), "b must be at least 0, got -2"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
