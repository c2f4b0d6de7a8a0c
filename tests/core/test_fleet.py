import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core.fleet import IdleClients, change_client, event_queue, first_clients, next_event, reschedule


@pytest.mark.parametrize("count", [1, 2, 5, 9, 37])
def test_the_queue_is_a_heap(count):
    """Small whole durations, so that many slots finish at once: the lowest comes first."""
    rng = np.random.default_rng(count)
    finish = rng.integers(0, 4, size=count).astype(np.float32)
    heap = [(t, slot) for slot, t in enumerate(finish)]
    heapq.heapify(heap)
    queue = event_queue(jnp.asarray(finish))

    @jax.jit
    def advance(queue, duration):
        slot, time = next_event(queue)
        return reschedule(queue, slot, time + duration), slot, time

    for duration in rng.integers(0, 4, size=60).astype(np.float32):
        time, slot = heapq.heappop(heap)
        queue, got_slot, got_time = advance(queue, jnp.asarray(duration))
        assert (got_slot, got_time) == (slot, time)
        heapq.heappush(heap, (time + duration, slot))


def test_never():
    queue = event_queue(jnp.array([jnp.nan, 3.0, jnp.inf]))
    slot, time = next_event(queue)
    assert (slot, time) == (1, 3)
    assert next_event(reschedule(queue, slot, jnp.float32(jnp.inf)))[1] == jnp.inf


def test_slots_go_to_those_that_come_first():
    starts = jnp.array([4.0, 0.0, 2.0, 0.0, 9.0])
    client, start, idle = first_clients(jax.random.key(0), starts, 3)
    assert sorted(client[:2].tolist()) == [1, 3] and client[2] == 2 and start.tolist() == [0, 0, 2]
    assert idle.client_id.tolist() == [0, 4] and idle.since.tolist() == [4, 9]
    client, start, idle = first_clients(jax.random.key(0), starts, 5)
    assert client.tolist() == [0, 1, 2, 3, 4] and idle is None
    np.testing.assert_array_equal(start, starts)


def test_first_slots_are_drawn_uniformly():
    keys = jax.random.split(jax.random.key(3), 3000)
    first = jax.vmap(lambda key: first_clients(key, jnp.zeros(6), 2)[0])(keys)
    counts = np.bincount(np.asarray(first).ravel(), minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 0.999 quantile of chi-square with 5 degrees of freedom


def test_an_idle_client_is_drawn_uniformly_among_those_that_have_come():
    idle = IdleClients(jnp.array([7, 3, 5, 1, 2], jnp.int32), jnp.array([0.0, 0.0, 2.0, 4.0, 6.0]))
    keys = jax.random.split(jax.random.key(5), 4000)
    chosen, after = jax.vmap(lambda key: change_client(idle, jnp.int32(9), jnp.asarray(True), jnp.float32(4.5), key))(
        keys
    )
    counts = np.bincount(np.asarray(chosen), minlength=10)
    assert counts[2] == 0 and counts[[0, 4, 6, 8]].sum() == 0
    expected = 4000 / 5
    assert ((counts[[7, 3, 5, 1, 9]] - expected) ** 2 / expected).sum() < 18.5  # 0.999 quantile, 4 degrees of freedom
    for client, rest in zip(np.asarray(chosen)[:50], np.asarray(after.client_id)[:50], strict=True):
        assert sorted([client, *rest]) == [1, 2, 3, 5, 7, 9] and rest[4] == 2
    np.testing.assert_array_equal(after.since[0], idle.since)


def test_who_stays_keeps_the_slot():
    idle = IdleClients(jnp.array([7, 3], jnp.int32), jnp.zeros(2))
    for seed in range(5):
        chosen, after = change_client(idle, jnp.int32(9), jnp.asarray(False), jnp.float32(1.0), jax.random.key(seed))
        assert chosen == 9 and after.client_id.tolist() == [7, 3]
