import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from cedarjax.distill import Relations, fetch, init_cache, median_logits, trimmed_logits, with_index, write
from tests.distill import distill_oracles as oracles

M, R, K = 7, 3, 2
ROWS = st.lists(st.tuples(st.integers(-2, M + 1), st.integers(-9, 9), st.booleans()), min_size=6, max_size=6)


jitted_write, jitted_fetch = jax.jit(write), jax.jit(fetch)


def make_cache(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    relations = Relations(jnp.asarray(rng.integers(0, M, (M, R))), jnp.asarray(rng.random((M, R)) < 0.7))
    return init_cache(relations, K, dtype=dtype)


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 5))
def test_writes_and_fetches_as_one_sample_at_a_time(batches, seed):
    """Integers: exact. Repeated samples, samples out of range and masked rows among them."""
    cache = make_cache(seed)
    index, mask = np.asarray(cache.relations), np.asarray(cache.relation_mask)
    logits, written = np.zeros((M, K)), np.zeros(M, bool)
    for rows in batches:
        at, values = np.array([r[0] for r in rows]), np.array([[r[1], -2 * r[1]] for r in rows], float)
        kept = np.array([r[2] for r in rows])
        cache = jitted_write(cache, jnp.asarray(at), jnp.asarray(values, jnp.float32), jnp.asarray(kept))
        for i, value, keep in zip(at, values, kept, strict=True):
            if keep and 0 <= i < M:
                logits[i], written[i] = value, True
        np.testing.assert_array_equal(cache.logits, logits)
        np.testing.assert_array_equal(cache.written, written)
        zbar, has = jitted_fetch(cache, jnp.arange(M))
        for i in range(M):
            related = [j for j, there in zip(index[i], mask[i], strict=True) if there and written[j]]
            total = np.sum([logits[j] for j in related], axis=0).astype(np.float32) if related else np.zeros(K)
            np.testing.assert_array_equal(zbar[i], total / np.float32(max(len(related), 1)))
            assert bool(has[i]) == bool(related)


def test_no_teacher_before_anything_is_written():
    """The published code reads the zeros of an unwritten cache, which are a uniform teacher."""
    zbar, has = fetch(make_cache(), jnp.arange(M))
    assert not has.any() and not zbar.any()


def test_what_is_not_written_does_not_count_in_the_mean():
    """The published code would have averaged three zeros in."""
    cache = init_cache(Relations(jnp.array([[1, 2, 3]] * 4), jnp.ones((4, 3), bool)), 1)
    cache = write(cache, jnp.array([2]), jnp.array([[6.0]]))
    assert fetch(cache, jnp.array([0]))[0].tolist() == [[6.0]]


def test_no_gradient_flows_through_the_cache():
    """The published code caches logits with their graph, and a later loss reaches the model that wrote them."""
    cache = make_cache()

    def later(logits):
        after = write(cache, jnp.arange(M), logits)
        return fetch(after, jnp.arange(M))[0].sum()

    def of_cached(logits):
        return fetch(cache._replace(logits=logits, written=jnp.ones(M, bool)), jnp.arange(M))[0].sum()

    values = jnp.ones((M, K))
    assert float(later(values)) > 0
    assert not jax.grad(lambda logits: write(cache, jnp.arange(M), logits).logits.sum())(values).any()
    assert not jax.grad(later)(values).any() and not jax.grad(of_cached)(values).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_not_written(bad):
    cache = write(make_cache(), jnp.array([1, 2]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    after = write(cache, jnp.array([1, 2, 3]), jnp.array([[5.0, bad], [6.0, 7.0], [bad, bad]]))
    assert after.logits[1:4].tolist() == [[1.0, 2.0], [6.0, 7.0], [0.0, 0.0]]
    assert after.written[1:4].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_cache_keeps_its_dtype(dtype):
    cache = write(make_cache(dtype=dtype), jnp.array([0]), jnp.ones((1, K), jnp.float32))
    zbar, _ = fetch(cache, jnp.array([0]))
    assert cache.logits.dtype == dtype == zbar.dtype


@pytest.mark.parametrize("num_trimmed", [0, 1, 2, 5])
def test_trimmed_means_and_medians_of_the_written_ones(num_trimmed):
    rng = np.random.default_rng(3)
    logits, mask = rng.normal(size=(20, 6, K)), rng.random((20, 6)) < 0.6
    mask[0] = False
    logits[~mask] = np.nan
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(mask)
    trimmed, median = jax.jit(trimmed_logits(num_trimmed))(*args), median_logits(*args)
    for b in range(20):
        values = np.sort(logits[b][mask[b]], axis=0)
        cut = min(num_trimmed, max(len(values) - 1, 0) // 2)
        want = values[cut : len(values) - cut].mean(axis=0) if len(values) else np.zeros(K)
        np.testing.assert_allclose(trimmed[b], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(median[b], np.median(values, axis=0) if len(values) else 0, rtol=1e-5, atol=1e-6)


def test_a_poisoned_minority_cannot_carry_a_robust_fetch_away():
    cache = init_cache(Relations(jnp.array([[1, 2, 3, 4, 5]] * 6), jnp.ones((6, 5), bool)), 1)
    values = jnp.array([[0.0], [1.0], [2.0], [3.0], [1e6], [1e6]])
    cache = write(cache, jnp.arange(6), values)
    fetched = {name: float(fetch(cache, jnp.array([0]), reduce_fn=f)[0][0, 0]) for name, f in {
        "median": median_logits, "trimmed": trimmed_logits(2)}.items()}  # fmt: skip
    assert float(fetch(cache, jnp.array([0]))[0][0, 0]) > 1e5
    assert fetched == {"median": 3.0, "trimmed": 3.0}


def test_the_index_travels_with_the_rows():
    dataset = oracles.make_dataset()
    cohort = cj.core.take_clients(dataset, jnp.array([3, 1]))
    assert cohort.data.examples["index"][:, :3].tolist() == [[9, 10, 11], [5, 6, 7]]
    shifted = with_index(dataset, start=100).examples["index"]
    assert shifted[0] == 100 and shifted[-1] == 114
    fewer = cj.data.select_clients(dataset, [2, 0])
    assert fewer.examples["index"].tolist() == [8, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: init_cache(Relations(c.relations, c.relation_mask), 0), "num_classes must be at least 1, got 0"),
        (
            lambda c: init_cache(Relations(c.relations, c.relation_mask[0]), 2),
            r"relations must be \[M, R\] twice, got the shapes \(7, 3\) and \(3,\)",
        ),
        (
            lambda c: write(c, jnp.arange(3), jnp.ones((3, 5))),
            r"logits must be \[B, K\] = \(3, 2\) for index \[B\], got the shape \(3, 5\)",
        ),
        (
            lambda c: fetch(c, jnp.arange(3), reduce_fn=lambda logits, mask: logits),
            r"reduce_fn must return \[B, K\] = \(3, 2\), got the shape \(3, 3, 2\)",
        ),
        (lambda c: trimmed_logits(-1), "num_trimmed must be at least 0, got -1"),
        (lambda c: with_index(oracles.make_dataset(), start=-1), "start must be at least 0, got -1"),
        (
            lambda c: with_index(cj.data.federated_dataset(np.ones(2), [0, 1])),
            "dataset.examples must be a dict, got ArrayImpl",
        ),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_cache())
