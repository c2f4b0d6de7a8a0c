import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax.data import prefetch, rows_as_cohort


class Source:
    """Counts the blocks that were asked for."""

    def __init__(self, count):
        self.count, self.made = count, 0

    def __iter__(self):
        for number in range(self.count):
            self.made += 1
            yield {"x": np.full((4, 2), number, np.float32), "n": np.arange(4, dtype=np.int32) + number}


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_blocks_come_in_order_and_on_the_device(count, size):
    got = list(prefetch(Source(count), size))
    assert len(got) == count
    for block, want in zip(got, Source(count), strict=True):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(block))
        jax.tree.map(np.testing.assert_array_equal, block, want)


def test_nothing_is_made_before_it_is_asked_for():
    source = Source(3)
    blocks = prefetch(source)
    assert source.made == 0
    next(blocks)
    assert source.made > 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_so_many_blocks_are_in_flight_beside_the_one_in_use(size):
    source = Source(8)
    made = []
    for number, _ in enumerate(prefetch(source, size)):
        made.append(source.made - number)  # those before it are done with
    assert made == [min(size, 8 - number) for number in range(8)]


def test_what_is_done_with_is_not_kept():
    blocks = prefetch(Source(6))
    first = next(blocks)["x"]
    before = {id(array) for array in jax.live_arrays()}
    assert id(first) in before
    del first
    for _ in range(3):
        next(blocks)
    # One in flight and one that was sent after it: no more than when the first block was in use.
    assert len(jax.live_arrays()) <= len(before)


def test_blocks_lie_on_the_mesh(mesh):
    sharding = NamedSharding(mesh, P("clients"))
    for block, want in zip(prefetch(Source(3), sharding=sharding), Source(3), strict=True):
        for name, leaf in block.items():
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, want[name])
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_must_be_positive(size):
    with pytest.raises(ValueError, match=f"size >= 1, got {size}"):
        prefetch([], size)
    with pytest.raises(TypeError, match="size must be an integer"):
        prefetch([], 1.5)


class Rows:
    """An array that remembers which of its rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.read = array, array.shape, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        self.read.append(rows)
        return self.array[rows]


def by_hand(rows, first, count, size):
    """Row by row, from the definition."""
    return np.stack(
        [
            np.stack([rows[(client * size + i) % len(rows)] for i in range(size)])
            for client in range(first, first + count)
        ]
    )


@pytest.mark.parametrize(
    ("length", "first", "count", "size"),
    [
        (12, 0, 2, 3),
        (12, 2, 2, 3),
        (12, 3, 2, 3),
        (7, 5, 3, 2),
        (5, 1_000_003, 4, 3),
        (3, 0, 4, 2),
        (2, 1, 3, 7),
        (1, 9, 2, 2),
    ],
    ids="start inside around_the_end odd far_on all_of_it_twice many_times one_row".split(),
)
def test_clients_are_rows_one_after_another(length, first, count, size):
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(length, 2, 3)).astype(np.float32), "y": np.arange(length, dtype=np.int32)}
    cohort = rows_as_cohort(examples, first, count, size)
    for name, rows in examples.items():
        got = cohort.data.examples[name]
        assert got.dtype == rows.dtype
        np.testing.assert_array_equal(got, by_hand(rows, first, count, size))
    np.testing.assert_array_equal(cohort.client_id, np.arange(first, first + count))
    np.testing.assert_array_equal(cohort.weights, np.full(count, size))
    np.testing.assert_array_equal(cohort.data.num_examples, np.full(count, size))
    np.testing.assert_array_equal(cohort.data.num_support, np.full(count, size // 2))
    kinds = [leaf.dtype for leaf in (cohort.client_id, cohort.weights, cohort.data.num_examples)]
    assert kinds == [np.int32, np.float32, np.int32]


def test_blocks_of_any_size_hold_the_same_clients():
    rows = np.arange(31)
    whole = rows_as_cohort(rows, 0, 12, 4).data.examples
    for size in (1, 3, 5):
        parts = [rows_as_cohort(rows, first, size, 4).data.examples for first in range(0, 12, size)]
        np.testing.assert_array_equal(np.concatenate(parts)[:12], whole)


def test_only_the_rows_of_these_clients_are_read():
    rows = Rows(np.arange(1000))
    rows_as_cohort({"x": rows}, 20, 3, 10)
    assert rows.read == [slice(200, 230)]


def test_rows_of_a_memory_map_are_copied(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40).reshape(20, 2))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    got = rows_as_cohort(x, 3, 2, 4).data.examples
    np.testing.assert_array_equal(got, by_hand(np.arange(40).reshape(20, 2), 3, 2, 4))


@pytest.mark.parametrize(
    ("examples", "counts", "message"),
    [
        (np.arange(4), (-1, 1, 1), "first_client >= 0, got -1"),
        (np.arange(4), (0, 0, 1), "num_clients >= 1, got 0"),
        (np.arange(4), (0, 1, 0), "num_examples >= 1, got 0"),
        ({"x": np.arange(4), "y": np.arange(5)}, (0, 1, 1), r"one number of rows, at least 1, got \[4, 5\]"),
        (np.zeros((0, 3)), (0, 1, 1), r"at least 1, got \[0\]"),
        ({}, (0, 1, 1), r"at least 1, got \[\]"),
    ],
)
def test_errors_say_what_is_allowed(examples, counts, message):
    with pytest.raises(ValueError, match=message):
        rows_as_cohort(examples, *counts)
