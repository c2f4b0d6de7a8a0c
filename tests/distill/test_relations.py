import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.distill import Relations, approximate_relations, build_relations, recall, relations_from_candidates
from cedarjax.distill.relations import unit_rows
from tests.distill.distill_oracles import brute_force


def assert_same(relations, expected):
    np.testing.assert_array_equal(relations.index, expected[0])
    np.testing.assert_array_equal(relations.mask, expected[1])


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(10_000, 24)), rng.integers(0, 10, 10_000)
    return embeddings, labels, brute_force(embeddings, labels, 16)


def test_ten_thousand_as_by_brute_force(many, x64):
    embeddings, labels, expected = many
    build = jax.jit(lambda e, y: build_relations(e, y, 16, block_size=1000))
    assert_same(build(jnp.asarray(embeddings), jnp.asarray(labels)), expected)


def test_ten_thousand_in_single_precision(many):
    """Every sample is where float64 has it, but for ties that float32 cannot tell apart."""
    embeddings, labels, (index, mask) = many
    relations = jax.jit(lambda e, y: build_relations(e, y, 16))(
        jnp.asarray(embeddings, jnp.float32), jnp.asarray(labels, jnp.int32)
    )
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = [(unit[np.asarray(i)] * unit[:, None]).sum(axis=2) for i in (relations.index, index)]
    np.testing.assert_allclose(similarity[0], similarity[1], atol=2e-6)
    assert relations.mask.all() and (np.asarray(relations.index) == index).mean() > 0.999
    assert recall(Relations(jnp.asarray(index), jnp.asarray(mask)), relations) > 0.9999


@jax.jit
def by_blocks(embeddings, labels, client_id):
    return build_relations(embeddings, labels, 3, block_size=4, client_id=client_id)


@jax.jit
def of_everybody(embeddings, labels, client_id):
    count = labels.shape[0]
    candidates = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None, ::-1], (count, count))
    return relations_from_candidates(embeddings, labels, candidates, 3, block_size=5, client_id=client_id)


@given(st.data())
def test_small_cases_with_ties_as_by_brute_force(data):
    """Signs along axes: every similarity is exact, most are equal, some rows are zeros."""
    count = data.draw(st.sampled_from([1, 3, 9]))
    rows = st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=3, max_size=3)
    drawn = np.array(data.draw(st.lists(rows, min_size=count, max_size=count)))
    embeddings = drawn * (np.cumsum(drawn != 0, axis=1) == 1)  # one axis a row, or none
    labels = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count)))
    owner = np.array(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    given_owner = data.draw(st.booleans())
    args = jnp.asarray(embeddings, jnp.float32), jnp.asarray(labels, jnp.int32)
    client_id = jnp.asarray(owner, jnp.int32) if given_owner else None
    expected = brute_force(embeddings.astype(float), labels, 3, owner if given_owner else None)
    assert_same(by_blocks(*args, client_id), expected)
    assert_same(of_everybody(*args, client_id), expected)


def test_a_duplicate_is_related_and_the_sample_itself_is_not():
    """The published code drops the first hit: of two equal samples it may keep the sample and drop its duplicate."""
    embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    relations = build_relations(embeddings, jnp.zeros(4, jnp.int32), 2)
    assert relations.index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_classes_with_fewer_samples_than_asked_for():
    """The published code raises where a class has no R + 1 samples."""
    labels = jnp.array([4, 9, 4, 4, 7, 7])
    relations = build_relations(jnp.eye(6) + 0.5, labels, 5)
    assert relations.mask.sum(axis=1).tolist() == [2, 0, 2, 2, 1, 1]
    assert relations.index[4].tolist() == [5, 0, 0, 0, 0] and relations.index[1].tolist() == [0] * 5


def test_rows_of_zeros_come_between_like_and_unlike():
    embeddings = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    relations = build_relations(embeddings, jnp.zeros(4, jnp.int32), 3)
    assert relations.index.tolist() == [[3, 2, 1], [2, 0, 3], [0, 1, 3], [0, 2, 1]] and relations.mask.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_related_to_nobody(bad):
    embeddings = jnp.array([[1.0, 0.0], [bad, 0.0], [0.0, 1.0]])
    relations = build_relations(embeddings, jnp.zeros(3, jnp.int32), 2)
    assert relations.mask.tolist() == [[True, False], [False, False], [True, False]]
    assert relations.index[:, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_do_not_overflow(scale):
    rows, finite = unit_rows(jnp.array([[3.0, 4.0]]) * scale)
    np.testing.assert_allclose(rows, [[0.6, 0.8]], rtol=1e-6)
    assert finite.all()


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_blocks_change_nothing(block_size):
    rng = np.random.default_rng(1)
    embeddings, labels = rng.normal(size=(70, 5)), rng.integers(0, 4, 70)
    build = jax.jit(lambda e, y: build_relations(e, y, 6, block_size=block_size))
    relations = build(jnp.asarray(embeddings, jnp.float32), jnp.asarray(labels, jnp.int32))
    assert_same(relations, brute_force(embeddings, labels, 6))


def test_no_block_is_square_in_the_samples():
    """Nothing in the program is larger than the samples or a block of them."""
    build = lambda e, y: build_relations(e, y, 4, block_size=32)  # noqa: E731
    args = jax.ShapeDtypeStruct((5000, 8), jnp.float32), jax.ShapeDtypeStruct((5000,), jnp.int32)
    sizes = [np.prod(shape) for shape in shapes_in(jax.make_jaxpr(build)(*args).jaxpr)]
    assert max(sizes) <= 5024 * 8


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_approximate_relations_and_their_recall():
    rng = np.random.default_rng(2)
    embeddings, labels = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, 200))
    exact = build_relations(embeddings, labels, 8)
    found = approximate_relations(embeddings, labels, 8, recall_target=0.9, block_size=64)
    assert recall(exact, found) >= 0.9
    same_label = np.asarray(labels)[np.asarray(found.index)] == np.asarray(labels)[:, None]
    assert same_label[np.asarray(found.mask)].all()
    assert not (np.asarray(found.index) == np.arange(200)[:, None])[np.asarray(found.mask)].any()


def test_recall_by_hand():
    exact = Relations(jnp.array([[1, 2], [0, 2], [0, 0]]), jnp.array([[True, True], [True, True], [False, False]]))
    other = Relations(jnp.array([[2, 0], [3, 4], [1, 1]]), jnp.array([[True, False], [True, True], [True, True]]))
    assert float(recall(exact, other)) == 0.25 and float(recall(exact, exact)) == 1.0
    assert float(recall(Relations(exact.index[2:], exact.mask[2:]), Relations(other.index[2:], other.mask[2:]))) == 1.0


def test_embeddings_of_half_precision_are_compared_in_single():
    embeddings = jnp.array([[1.0, 0.0], [1.0, 0.0625], [1.0, 0.109375]], jnp.bfloat16)
    assert build_relations(embeddings, jnp.zeros(3, jnp.int32), 2).index.tolist() == [[1, 2], [2, 0], [1, 0]]


EYE, ZEROS = np.eye(3, dtype=np.float32), np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: build_relations(EYE, ZEROS, 0), ValueError, "num_related must be at least 1, got 0"),
        (lambda: build_relations(EYE, ZEROS, 1, block_size=0), ValueError, "block_size must be at least 1, got 0"),
        (lambda: build_relations(EYE[0], ZEROS, 1), ValueError, r"embeddings must be \[M, d\] .* got the shape \(3,\)"),
        (lambda: build_relations(EYE, ZEROS[:2], 1), ValueError, r"labels must be \[M\] with M = 3, .* \(2,\)"),
        (lambda: build_relations(EYE, EYE[0], 1), TypeError, "labels must be integers, got float32"),
        (lambda: build_relations(EYE.astype(int), ZEROS, 1), TypeError, "embeddings must be floats, got int"),
        (lambda: build_relations(EYE, ZEROS, 1, client_id=ZEROS[:1]), ValueError, r"client_id must be \[M\]"),
        (
            lambda: approximate_relations(EYE, ZEROS, 1, recall_target=1.5),
            ValueError,
            "0 < recall_target <= 1, got 1.5",
        ),
        (
            lambda: relations_from_candidates(EYE, ZEROS, ZEROS, 1),
            ValueError,
            r"candidates must be \[M, Q\] with M = 3",
        ),
        (lambda: relations_from_candidates(EYE, ZEROS, EYE, 1), TypeError, "candidates must be integers, got float32"),
        (
            lambda: recall(Relations(EYE, EYE), Relations(EYE[:2], EYE[:2])),
            ValueError,
            "approximate must have M = 3 rows like exact, got 2",
        ),
    ],
)
def test_what_does_not_fit(build, error, message):
    with pytest.raises(error, match=message):
        build()
