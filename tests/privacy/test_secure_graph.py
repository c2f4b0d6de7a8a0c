"""Who shares masks with whom, and whether the graph that is chosen keeps what it promises."""

import jax
import numpy as np
import pytest

from cedarjax.privacy import secure_aggregation as secure

stats = pytest.importorskip("scipy.stats")
SIZES = [(2, 1), (3, 2), (5, 2), (5, 4), (6, 3), (6, 5), (8, 4), (9, 6), (10, 9), (12, 5)]


@pytest.mark.parametrize(("count", "k"), SIZES)
def test_every_pair_of_neighbours_is_met_once(count, k):
    ring = secure.Ring(count, k)
    pairs = []
    for ahead, signs in zip(np.asarray(ring.ahead()), np.asarray(ring.signs()), strict=True):
        for place, (other, sign) in enumerate(zip(ahead, signs, strict=True)):
            if sign:
                assert sign == (1 if place < other else -1)
                pairs.append((min(place, other), max(place, other)))
    assert len(pairs) == len(set(pairs)) == ring.num_pairs == count * k // 2
    want = {
        (i, j) for i in range(count) for j in range(i + 1, count)
        if min(j - i, count - j + i) <= k // 2 or (k % 2 and j - i == count // 2)
    }  # fmt: skip
    assert set(pairs) == want
    holders = np.asarray(ring.holders())
    assert holders.shape == (count, k + 1)
    assert [set(row) - {i} for i, row in enumerate(holders)] == [
        {b if a == i else a for a, b in want if i in (a, b)} for i in range(count)
    ]
    assert (holders[:, 0] == np.arange(count)).all()


def test_the_complete_graph_seats_nobody_and_a_ring_shuffles():
    assert secure.Ring(7, 6).order(jax.random.key(0)).tolist() == list(range(7))
    order = secure.Ring(40, 4).order(jax.random.key(0)).tolist()
    assert sorted(order) == list(range(40)) and order != list(range(40))
    assert order != secure.Ring(40, 4).order(jax.random.key(1)).tolist()


@pytest.mark.parametrize(
    ("count", "k", "message"),
    [
        (1, 1, "num_clients must be at least 2 for a secure sum, got 1"),
        (5, 5, "1 <= num_neighbors < num_clients, got 5 and 5"),
        (5, 0, "1 <= num_neighbors < num_clients, got 0 and 5"),
        (5, 3, "num_neighbors must be even if num_clients is odd, got 3 and 5"),
    ],
)
def test_impossible_rings_are_refused(count, k, message):
    with pytest.raises(ValueError, match=message):
        secure.Ring(count, k)


def kept(count, k, t, corrupt, dropped, security, failure):
    """Whether the three bounds hold, by scipy's distribution."""
    betrayed = count * stats.hypergeom(count - 1, corrupt, k).sf(t - 1)
    failing = count * stats.hypergeom(count - 1, count - 1 - dropped, k).cdf(t - 1)
    cut = count * ((corrupt + dropped) / count) ** (k / 2)
    return betrayed <= 2.0**-security, failing <= 2.0**-failure, cut <= 2.0**-security


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.1, 0.05), (0.05, 0.2), (0.25, 0.25)])
@pytest.mark.parametrize("count", [200, 1000, 2000])
def test_the_chosen_graph_is_the_smallest_that_keeps_its_bounds(count, shares):
    corrupt, dropped = round(shares[0] * count), round(shares[1] * count)
    k, t = secure.choose_graph(count, max_corrupt=shares[0], max_dropped=shares[1], security_bits=30, failure_bits=15)
    assert k < count - 1 and all(kept(count, k, t, corrupt, dropped, 30, 15))
    assert not kept(count, k, t - 1, corrupt, dropped, 30, 15)[0]  # a smaller threshold would betray
    assert not any(all(kept(count, k - 2, s, corrupt, dropped, 30, 15)) for s in range(1, k - 1))


def test_nothing_less_than_the_complete_graph_will_do_for_few_clients():
    assert secure.choose_graph(10, max_corrupt=0.3, max_dropped=0.3) == (9, 4)
    assert secure.choose_graph(2, max_corrupt=0.0, max_dropped=0.0) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_corrupt": 0.5, "max_dropped": 0.5}, "add up to less than 1, got 0.5 and 0.5"),
        ({"max_corrupt": -0.1, "max_dropped": 0.5}, "got -0.1 and 0.5"),
        ({"max_corrupt": 0.45, "max_dropped": 0.5}, "must leave more survivors .* got 5 corrupt and 5 dropped"),
        (
            {"max_corrupt": 0.1, "max_dropped": 0.1, "security_bits": 0},
            "security_bits and .* got 0 and 20",
        ),
    ],
)
def test_a_graph_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        secure.choose_graph(10, **arguments)
