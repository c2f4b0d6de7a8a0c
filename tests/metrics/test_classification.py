"""Scores against scikit-learn, which sees nothing but the present rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from cedarjax.metrics import Confusion, confusion

NAMES = ("loss", "accuracy", "precision", "recall", "f1", "mcc")


@jax.jit
def score(logits, labels, mask):
    return confusion(logits, labels, mask).summarise()


def oracle(logits, labels):
    """The six scores from the rows that are there, in float64."""
    logits = np.float64(logits)
    predicted = logits.argmax(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    mcc = metrics.matthews_corrcoef(labels, predicted)
    return losses.mean(), metrics.accuracy_score(labels, predicted), precision, recall, f1, mcc


def examples(seed, num_rows, num_classes, num_seen):
    """Logits that know something, and labels of `num_seen` classes only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_seen, num_rows).astype(np.int32)
    logits = rng.normal(size=(num_rows, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return np.float32(logits), labels, rng.random(num_rows) < 0.7


@given(seed=st.integers(0, 10_000), num_seen=st.integers(1, 5), num_rows=st.sampled_from([8, 40]))
def test_scores_agree_with_scikit_learn(seed, num_seen, num_rows):
    logits, labels, mask = examples(seed, num_rows, 5, num_seen)
    mask[0] = True
    np.testing.assert_allclose(score(logits, labels, mask), oracle(logits[mask], labels[mask]), rtol=2e-5, atol=1e-6)


def test_a_class_that_is_neither_true_nor_predicted_does_not_count():
    logits = jnp.eye(9)[jnp.array([0, 0, 1, 2])]
    scores = confusion(logits, jnp.array([0, 1, 1, 1])).summarise()
    expected = oracle(logits, np.array([0, 1, 1, 1]))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert float(scores.precision) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert float(scores.recall) == pytest.approx((1 + 1 / 3 + 0) / 3)


@pytest.mark.parametrize("predicted", [0, 1])
def test_mcc_is_zero_for_a_constant_prediction(predicted):
    logits = jnp.tile(10.0 * jnp.eye(3)[predicted], (7, 1))
    scores = confusion(logits, jnp.array([0, 0, 1, 1, 1, 2, 0])).summarise()
    assert float(scores.mcc) == 0.0


def test_mcc_of_many_examples_does_not_cancel():
    matrix = np.array([[9_000_000, 5], [3, 40]])
    scores = Confusion(jnp.asarray(matrix, jnp.float32), jnp.float32(0), jnp.float32(matrix.sum())).summarise()
    (tn, fp), (fn, tp) = matrix.tolist()
    expected = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn)) * float((tn + fp) * (tn + fn)))
    assert float(scores.mcc) == pytest.approx(expected, rel=1e-3)


def test_rows_outside_the_mask_are_not_read():
    logits, labels, mask = examples(0, 20, 4, 4)
    dirty = np.where(mask[:, None], logits, np.nan)
    dirty[np.flatnonzero(~mask)[0]] = np.inf
    clean = confusion(jnp.asarray(logits[mask]), jnp.asarray(labels[mask]))
    masked = confusion(jnp.asarray(dirty), jnp.where(mask, labels, -7), jnp.asarray(mask, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), masked, clean)


def test_nothing_scores_zero():
    logits, labels, mask = examples(0, 8, 4, 4)
    assert [float(value) for value in score(logits, labels, np.zeros_like(mask))] == [0.0] * 6


@pytest.mark.parametrize("cut", [0, 1, 13, 30])
def test_merging_batches_is_scoring_them_at_once(cut):
    logits, labels, mask = map(jnp.asarray, examples(1, 30, 4, 4))
    whole = confusion(logits, labels, mask)
    parts = [confusion(logits[s], labels[s], mask[s]) for s in (slice(cut), slice(cut, None))]
    merged = parts[0].merge(parts[1])
    np.testing.assert_array_equal(merged.matrix, whole.matrix)
    np.testing.assert_allclose(merged.summarise(), whole.summarise(), rtol=1e-5)


def test_clients_are_scored_under_vmap_and_pooled():
    logits, labels, mask = map(jnp.asarray, examples(2, 24, 4, 4))
    stacked = jax.vmap(confusion)(logits.reshape(3, 8, 4), labels.reshape(3, 8), mask.reshape(3, 8))
    each = jax.vmap(Confusion.summarise)(stacked)
    for client in range(3):
        rows = np.flatnonzero(mask[8 * client : 8 * client + 8]) + 8 * client
        expected = oracle(logits[rows], np.asarray(labels)[rows])
        np.testing.assert_allclose([value[client] for value in each], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stacked.pool().summarise(), score(logits, labels, mask), rtol=1e-5)


def test_infinite_logits_of_other_classes_do_not_poison_the_loss():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    assert float(confusion(logits, jnp.array([2])).loss_sum) == pytest.approx(np.log(2), rel=1e-6)


def test_an_unknown_label_is_an_error_of_the_prediction():
    scores = confusion(jnp.eye(2), jnp.array([0, 5])).summarise()
    assert float(scores.accuracy) == 0.5 and np.isfinite(scores).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_accumulates_in_float32(dtype):
    counted = confusion(jnp.eye(3, dtype=dtype), jnp.array([0, 1, 1], jnp.int8))
    assert all(leaf.dtype == jnp.float32 for leaf in counted)
    assert all(value.dtype == jnp.float32 for value in counted.summarise())


@pytest.mark.parametrize(
    ("logits", "labels", "mask", "error", "message"),
    [
        ((4, 3), jnp.zeros(4), None, TypeError, "labels must be integers"),
        ((4, 3), jnp.zeros(5, jnp.int32), None, ValueError, r"got \(4, 3\) and \(5,\)"),
        ((4,), jnp.zeros(4, jnp.int32), None, ValueError, r"\[B, K\]"),
        ((4, 3), jnp.zeros(4, jnp.int32), jnp.ones((4, 1)), ValueError, "mask must have the shape"),
    ],
)
def test_bad_input(logits, labels, mask, error, message):
    with pytest.raises(error, match=message):
        confusion(jnp.ones(logits), labels, mask)


def test_fields_are_in_the_order_of_the_oracle():
    assert confusion(jnp.eye(2), jnp.array([0, 1])).summarise()._fields == NAMES
