import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core.chunks import resolve_chunk_size


def matrix_work(shared, x):
    return jnp.tanh(x @ shared) @ shared.T


def clients(size, count=9973):  # a prime: no chunk divides it
    return jnp.ones((4, size)), (jnp.ones((count, 3, 4)),)


def fake_mesh(platform, stats):
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    return types.SimpleNamespace(devices=np.array([device], dtype=object), size=1)


def test_numbers_and_none_are_kept():
    shared, per_client = clients(8)
    for given in (1, 7, None):
        assert resolve_chunk_size(given, matrix_work, shared, per_client) == given


def test_on_a_cpu_small_clients_go_together_and_large_ones_in_pairs():
    sizes = [resolve_chunk_size("auto", matrix_work, *clients(size)) for size in (4, 2**10, 2**14, 2**20)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1000 and 2 < sizes[1] < 200 and sizes[-1] == 2


def test_on_an_accelerator_all_go_together_as_far_as_memory_reaches():
    shared, per_client = clients(1000)
    assert resolve_chunk_size("auto", matrix_work, shared, per_client, fake_mesh("gpu", None)) is None
    large = resolve_chunk_size("auto", matrix_work, shared, per_client, fake_mesh("gpu", {"bytes_limit": 2**34}))
    small = resolve_chunk_size("auto", matrix_work, shared, per_client, fake_mesh("gpu", {"bytes_limit": 2**20}))
    needed = cj.core.memory_estimate(matrix_work, shared, per_client[0][0])
    assert 1 <= small < large
    assert small * (needed.temporaries + needed.results) <= 0.6 * 2**20


@pytest.mark.parametrize(
    ("most", "count", "expected"), [(60, 1000, 50), (60, 7, 7), (60, 61, 60), (60, 122, 60), (2, 9, 2)]
)
def test_chunks_divide_the_clients_where_one_of_about_that_size_does(most, count, expected):
    one = cj.core.memory_estimate(matrix_work, clients(8)[0], clients(8)[1][0][0])
    limit = {"bytes_limit": math.ceil((one.temporaries + one.results) * most / 0.6) + 1}
    shared, per_client = clients(8, count)
    assert resolve_chunk_size("auto", matrix_work, shared, per_client, fake_mesh("gpu", limit)) == expected


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_chosen_changes_no_result(streamed, sharded, mesh):
    local = cj.local.sgd(lambda w, x, key: jnp.mean((x @ w) ** 2), optax.sgd(0.1), batch_size=2)
    rng = np.random.default_rng(0)
    rows = jnp.array([4, 3, 2, 4, 1, 4, 4], jnp.int32)
    data = cj.ClientData(jnp.asarray(rng.normal(size=(7, 4, 5)), jnp.float32), rows, rows // 2)
    cohort = cj.Cohort(data, rows.astype(jnp.float32), jnp.arange(7))

    def after(chunk_size, mesh):
        if streamed:
            algorithm = cj.streamed_round(local, optax.sgd(1.0), chunk_size=chunk_size, mesh=mesh)
        else:
            chain = optax.chain(cj.robust.mean(), optax.sgd(1.0))
            algorithm = cj.federated_round(local, chain, cj.cohort_map(chunk_size, mesh))
        return jax.jit(algorithm.step)(algorithm.init(jnp.ones((5, 2))), cohort, jax.random.key(0))

    want, got = after(1, None), after("auto", mesh if sharded else None)
    np.testing.assert_allclose(got[0].params, want[0].params, rtol=1e-5)
    np.testing.assert_allclose(got[2].local.loss, want[2].local.loss, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, -1, "all", 1.5])
def test_other_chunk_sizes_are_refused(chunk_size):
    with pytest.raises(ValueError, match='chunk_size must be "auto", None or at least 1, got'):
        cj.cohort_map(chunk_size)


def test_a_stream_is_never_all_clients_at_once():
    local = cj.local.sgd(lambda w, x, key: w, optax.sgd(0.1), batch_size=1)
    with pytest.raises(ValueError, match="chunk_size must be"):
        cj.streamed_round(local, optax.sgd(1.0), chunk_size=None)
