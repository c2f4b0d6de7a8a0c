"""Federations on the device: host constructors, gathering, sampling and padding of cohorts."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import data
from cedarjax.core.dataset import ABSENT_ID, FederatedDataset, pad_cohort, sample_cohort, take_clients
from cedarjax.core.types import Cohort

COUNTS = [3, 1, 5, 2]
OWNER = np.repeat(np.arange(4), COUNTS)


def ragged(counts=COUNTS, num_support=None):
    rng = np.random.default_rng(0)
    n = sum(counts)
    examples = {
        "x": rng.normal(size=(n, 2, 3)).astype(np.float32) + 10,
        "y": rng.integers(1, 9, n).astype(np.int32),
        "flag": np.ones(n, bool),
    }
    return examples, data.federated_dataset(
        examples, np.repeat(np.arange(len(counts)), counts), num_support=num_support
    )


def test_sorts_by_client_stably_and_compacts_ids():
    x = np.arange(6, dtype=np.float32)
    dataset = data.federated_dataset({"x": x}, np.array([70, -2, 70, 5, -2, 70]))
    np.testing.assert_array_equal(dataset.examples["x"], [1, 4, 3, 0, 2, 5])
    np.testing.assert_array_equal(dataset.offsets, [0, 2, 3, 6])
    np.testing.assert_array_equal(dataset.counts, [2, 1, 3])
    np.testing.assert_array_equal(dataset.num_support, dataset.counts)
    assert (dataset.num_clients, dataset.num_examples, dataset.max_examples) == (3, 6, 3)
    assert dataset.offsets.dtype == dataset.num_support.dtype == jnp.int32


def test_storage_has_no_padding():
    _, dataset = ragged([1, 100, 1])
    assert dataset.examples["x"].shape == (102, 2, 3)


def test_from_partition_may_repeat_and_leave_out_rows():
    x = np.arange(10, dtype=np.float32)
    dataset = data.from_partition(x, [np.array([9, 0, 0]), [4]])
    np.testing.assert_array_equal(dataset.examples, [9, 0, 0, 4])
    np.testing.assert_array_equal(dataset.counts, [3, 1])


def test_from_partition_of_natural_is_federated_dataset():
    owner = np.array([2, 0, 2, 1, 0])
    x = np.arange(5, dtype=np.float32)
    a, b = data.federated_dataset(x, owner), data.from_partition(x, data.natural(owner))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def test_is_a_pytree_with_static_length():
    _, dataset = ragged()
    leaves, treedef = jax.tree.flatten(dataset)
    assert len(leaves) == 5
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, FederatedDataset) and again.max_examples == 5
    assert jax.jit(lambda d: jnp.zeros((d.num_clients, d.num_examples, d.max_examples)))(dataset).shape == (4, 11, 5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("ids", [[2], [0, 1, 2, 3], [3, 3, 0], [1, 2]])
def test_gather_equals_numpy_slices_padded_with_zeros(ids, jit):
    examples, dataset = ragged(num_support=[2, 0, 5, 1])
    take = jax.jit(take_clients) if jit else take_clients
    cohort = take(dataset, jnp.array(ids))
    for row, client in enumerate(ids):
        mine = OWNER == client
        for name, leaf in examples.items():
            expected = np.zeros((5, *leaf.shape[1:]), leaf.dtype)
            expected[: COUNTS[client]] = leaf[mine]
            got = cohort.data.examples[name]
            assert got.dtype == leaf.dtype and got.shape == (len(ids), 5, *leaf.shape[1:])
            np.testing.assert_array_equal(got[row], expected)
    np.testing.assert_array_equal(cohort.data.num_examples, np.array(COUNTS)[ids])
    np.testing.assert_array_equal(cohort.data.num_support, np.array([2, 0, 5, 1])[ids])
    np.testing.assert_array_equal(cohort.weights, np.array(COUNTS, np.float32)[ids])
    np.testing.assert_array_equal(cohort.client_id, ids)
    assert cohort.weights.dtype == jnp.float32 and cohort.client_id.dtype == jnp.int32
    assert cohort.state == () and cohort.byzantine is None


@hypothesis.given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_gather_of_everybody_gives_all_examples_back(counts, seed):
    owner = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    x = np.arange(1, len(owner) + 1)
    cohort = take_clients(data.federated_dataset(x, owner), jnp.arange(len(counts)))
    for client, rows in enumerate(np.asarray(cohort.data.examples)):
        np.testing.assert_array_equal(rows[: counts[client]], x[owner == client])
        assert not rows[counts[client] :].any()


def test_uniform_weights_and_byzantine_mask():
    _, dataset = ragged()
    byzantine = jnp.array([True, False, False, True])
    cohort = take_clients(dataset, jnp.array([3, 2]), weighting="uniform", byzantine=byzantine)
    np.testing.assert_array_equal(cohort.weights, [1.0, 1.0])
    np.testing.assert_array_equal(cohort.byzantine, [True, False])


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_absent_rows_count_for_nothing(weighting):
    _, dataset = ragged()
    cohort = take_clients(
        dataset,
        jnp.array([2, 1, -1, 4, ABSENT_ID]),
        weighting=weighting,
        byzantine=jnp.ones(4, bool),
        present=jnp.array([True, False, True, True, True]),
    )
    np.testing.assert_array_equal(cohort.weights > 0, [True, False, False, False, False])
    np.testing.assert_array_equal(cohort.byzantine, [True, False, False, False, False])
    np.testing.assert_array_equal(cohort.data.num_examples, [5, 0, 0, 0, 0])
    np.testing.assert_array_equal(cohort.data.num_support, [5, 0, 0, 0, 0])
    assert all(not np.asarray(leaf[1:]).any() for leaf in jax.tree.leaves(cohort.data.examples))
    stored = jnp.zeros(4).at[cohort.client_id].set(jnp.ones(5), mode="drop")
    np.testing.assert_array_equal(stored, [0, 0, 1, 0])


def test_sample_has_no_repeats_and_uniform_frequencies():
    num_clients, size, num_draws = 12, 5, 4000
    dataset = data.federated_dataset(np.zeros(num_clients, np.float32), np.arange(num_clients))
    keys = jax.random.split(jax.random.key(0), num_draws)
    ids = np.asarray(jax.jit(jax.vmap(lambda key: sample_cohort(key, dataset, size).client_id))(keys))
    assert ids.shape == (num_draws, size)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    share = size / num_clients
    deviation = np.sqrt(num_draws * share * (1 - share))
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=num_clients), num_draws * share, atol=4.5 * deviation)
    pairs = np.zeros((num_clients, num_clients))
    for row in ids:
        pairs[np.ix_(row, row)] += 1
    together = size * (size - 1) / (num_clients * (num_clients - 1))
    off_diagonal = pairs[~np.eye(num_clients, dtype=bool)]
    deviation = np.sqrt(num_draws * together * (1 - together))
    np.testing.assert_allclose(off_diagonal, num_draws * together, atol=5 * deviation)


def test_sample_depends_on_the_key_alone_and_jit_changes_nothing():
    _, dataset = ragged([1] * 30)
    sample = jax.jit(sample_cohort, static_argnames="num_clients")
    a, b = sample_cohort(jax.random.key(1), dataset, 6), sample(jax.random.key(1), dataset, num_clients=6)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)
    other = sample_cohort(jax.random.key(2), dataset, 6)
    assert not np.array_equal(a.client_id, other.client_id)


def test_sample_gathers_what_take_gathers():
    _, dataset = ragged()
    byzantine = jnp.array([True, False, True, False])
    drawn = sample_cohort(jax.random.key(0), dataset, 2, weighting="uniform", byzantine=byzantine)
    taken = take_clients(dataset, drawn.client_id, weighting="uniform", byzantine=byzantine)
    for left, right in zip(jax.tree.leaves(drawn), jax.tree.leaves(taken), strict=True):
        np.testing.assert_array_equal(left, right)


def test_sample_of_everybody_is_in_order():
    _, dataset = ragged()
    np.testing.assert_array_equal(sample_cohort(jax.random.key(5), dataset, 4).client_id, [0, 1, 2, 3])


def test_one_trace_serves_every_round():
    _, dataset = ragged()
    traces = []

    @jax.jit
    def rounds(dataset, key):
        traces.append(None)
        keys = jax.random.split(key, 3)
        return jax.lax.map(lambda k: sample_cohort(k, dataset, 2).data.examples["x"].sum(), keys)

    rounds(dataset, jax.random.key(0))
    rounds(dataset, jax.random.key(1))
    assert len(traces) == 1


def test_pad_cohort_adds_absent_finite_rows():
    _, dataset = ragged()
    cohort = take_clients(dataset, jnp.array([2, 0]), byzantine=jnp.ones(4, bool))
    cohort = cohort._replace(state={"m": jnp.array([1.0, 2.0])})
    padded = jax.jit(pad_cohort, static_argnums=1)(cohort, 5)
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(padded))
    for before, after in zip(jax.tree.leaves(cohort), jax.tree.leaves(padded), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after[:2])
    np.testing.assert_array_equal(padded.weights[2:], [0, 0, 0])
    np.testing.assert_array_equal(padded.byzantine[2:], [False] * 3)
    assert (padded.data.num_examples >= 1).all() and jnp.isfinite(padded.data.examples["x"]).all()
    stored = jnp.zeros(4).at[padded.client_id].set(jnp.full(5, 9.0), mode="drop")
    np.testing.assert_array_equal(stored, [9, 0, 9, 0])


def test_pad_cohort_to_its_own_size_changes_nothing():
    cohort = take_clients(ragged()[1], jnp.array([2, 0]))
    for before, after in zip(jax.tree.leaves(cohort), jax.tree.leaves(pad_cohort(cohort, 2)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_select_clients_keeps_support_and_shrinks_the_padding():
    examples, dataset = ragged(num_support=[1, 1, 4, 2])
    chosen = data.select_clients(dataset, np.array([3, 0]))
    expected = np.concatenate([examples["x"][OWNER == 3], examples["x"][OWNER == 0]])
    np.testing.assert_array_equal(chosen.examples["x"], expected)
    np.testing.assert_array_equal(chosen.counts, [2, 3])
    np.testing.assert_array_equal(chosen.num_support, [2, 1])
    assert chosen.max_examples == 3


def test_dtypes_become_those_of_the_device(x64):
    dataset = data.federated_dataset({"x": np.zeros(2), "y": np.zeros(2, np.int64)}, [0, 1])
    assert dataset.examples["x"].dtype == jnp.float64 and dataset.examples["y"].dtype == jnp.int64
    cohort = sample_cohort(jax.random.key(0), dataset, 1)
    assert cohort.data.examples["x"].dtype == jnp.float64
    assert cohort.weights.dtype == jnp.float32 and cohort.client_id.dtype == jnp.int32
    assert cohort.data.num_examples.dtype == cohort.data.num_support.dtype == jnp.int32


def test_small_dtypes_are_kept():
    examples = {"image": np.full(3, 255, np.uint8), "half": np.ones(3, jnp.bfloat16)}
    dataset = data.federated_dataset(examples, [0, 0, 1])
    assert dataset.examples["image"].dtype == jnp.uint8 and dataset.examples["half"].dtype == jnp.bfloat16
    assert take_clients(dataset, jnp.array([1])).data.examples["half"].dtype == jnp.bfloat16


def bad_rows():
    return {"deep": {"x": np.array([[1.0, 2.0], [3.0, np.nan], [np.inf, 0.0]])}}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: data.federated_dataset(np.zeros(3), [0, 1]), ValueError, "client_id must have n = 3 rows.*got 2"),
        (lambda: data.federated_dataset({"x": np.zeros(3), "y": np.zeros(2)}, [0, 1, 1]), ValueError, "examples/y': 2"),
        (lambda: data.federated_dataset({}, [0]), ValueError, "examples must hold at least one array"),
        (lambda: data.federated_dataset({"x": [1.0]}, [0]), ValueError, "examples/x/0 must be an array"),
        (lambda: data.federated_dataset(np.zeros((0, 2)), []), ValueError, "client_id must have shape"),
        (lambda: data.from_partition(np.zeros((0, 2)), [[0]]), ValueError, "at least one row, got 0"),
        (
            lambda: data.federated_dataset(bad_rows(), [1, 1, 0]),
            ValueError,
            "examples/deep/x must be finite .* got 2 rows",
        ),
        (lambda: data.federated_dataset(np.array([1e300]), [0]), ValueError, "examples must be finite in float32"),
        (lambda: data.federated_dataset({"y": np.array([2**40])}, [0]), ValueError, "examples/y must fit int32"),
        (lambda: data.federated_dataset({"y": np.array(["cat"])}, [0]), TypeError, "examples/y must hold numbers"),
        (lambda: data.federated_dataset(np.zeros(2), [0.0, 1.0]), TypeError, "client_id must be discrete"),
        (lambda: data.federated_dataset(np.zeros(2), [0, 1], num_support=2), ValueError, "<= 1 .*client 0, got 2"),
        (lambda: data.federated_dataset(np.zeros(2), [0, 1], num_support=[1, -1]), ValueError, "client 1, got -1"),
        (lambda: data.federated_dataset(np.zeros(2), [0, 1], num_support=[1]), ValueError, r"shape \[N\] = \[2\]"),
        (lambda: data.federated_dataset(np.zeros(2), [0, 1], num_support=0.5), TypeError, "num_support must be an int"),
        (lambda: data.from_partition(np.zeros(2), []), ValueError, "partition must hold at least one client"),
        (lambda: data.from_partition(np.zeros(2), [[0], []]), ValueError, r"partition\[1\] .*empty client"),
        (lambda: data.from_partition(np.zeros(2), [[0], [2]]), ValueError, r"partition\[1\] .* between 0 and 1"),
        (lambda: data.from_partition(np.zeros(2), [[-1]]), ValueError, r"partition\[0\]"),
        (lambda: data.from_partition(np.zeros(2), [[True, False]]), TypeError, r"partition\[0\] must hold integer"),
        (lambda: data.select_clients(ragged()[1], [1, 1]), ValueError, "none twice"),
        (lambda: data.select_clients(ragged()[1], [4]), ValueError, "client_ids must hold indices between 0 and 3"),
        (lambda: data.select_clients(ragged()[1], []), ValueError, "at least one client"),
        (lambda: sample_cohort(jax.random.key(0), ragged()[1], 0), ValueError, "1 <= num_clients <= 4.*got 0"),
        (lambda: sample_cohort(jax.random.key(0), ragged()[1], 5), ValueError, "1 <= num_clients <= 4.*got 5"),
        (
            lambda: sample_cohort(jax.random.key(0), ragged()[1], 2, weighting="size"),
            ValueError,
            "weighting must be one",
        ),
        (lambda: take_clients(ragged()[1], jnp.zeros((1, 1), int)), ValueError, r"client_ids must have shape \[C\]"),
        (lambda: take_clients(ragged()[1], jnp.zeros(2)), TypeError, "client_ids must be integers"),
        (lambda: take_clients(ragged()[1], jnp.arange(2), present=jnp.ones(3)), ValueError, "present must have"),
        (lambda: take_clients(ragged()[1], jnp.arange(2), byzantine=jnp.ones(2)), ValueError, r"byzantine must have"),
        (lambda: pad_cohort(take_clients(ragged()[1], jnp.arange(3)), 2), ValueError, "got C = 3 and 2"),
        (
            lambda: pad_cohort(Cohort(jnp.ones(3), jnp.ones(2), jnp.arange(2)), 4),
            ValueError,
            r"cohort.data must have C = 2 rows",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
