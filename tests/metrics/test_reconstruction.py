"""Image scores against their formulas in float64, assignments against SciPy's, labels against counting."""

import collections
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from cedarjax.metrics import label_accuracy, match_rows, psnr, reconstruction, ssim
from cedarjax.metrics.reconstruction import _assignment


def images(seed, shape):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def oracle_ssim(x, y, data_range):
    """Window by window, with explicit weighted moments."""
    x, y = np.float64(x), np.float64(y)
    grid = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(grid, grid) / grid.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            for channel in range(x.shape[2]):
                a, b = (z[top : top + 11, left : left + 11, channel] for z in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                scores.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(scores)


@pytest.mark.parametrize(
    ("shape", "data_range"), [((2, 14, 12, 1), 1.0), ((1, 11, 11, 3), 1.0), ((1, 13, 15, 2), 255.0)]
)
def test_ssim_is_its_formula(shape, data_range):
    target = images(0, shape) * data_range
    x = (target + 0.2 * data_range * (images(1, shape) - 0.5)).astype(np.float32)
    expected = [oracle_ssim(a, b, data_range) for a, b in zip(x, target, strict=True)]
    np.testing.assert_allclose(ssim(x, target, data_range=data_range), expected, rtol=2e-5)


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, target = images(0, (1, 20, 24, 1)), images(1, (1, 20, 24, 1))
    theirs = metrics.structural_similarity(
        x[0, ..., 0], target[0, ..., 0], data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    np.testing.assert_allclose(ssim(x, target), [theirs], rtol=1e-4)


def test_ssim_of_equal_and_of_flat_images():
    image = images(0, (1, 16, 16, 1))
    assert ssim(image, image)[0] == pytest.approx(1, abs=1e-6)
    flat = np.full((1, 16, 16, 1), 0.5, np.float32)
    # Without structure only the luminance term is left.
    assert ssim(np.full_like(flat, 0.25), flat)[0] == pytest.approx(
        (2 * 0.125 + 1e-4) / (0.0625 + 0.25 + 1e-4), rel=1e-5
    )


def test_psnr_by_hand():
    target = np.zeros((3, 2, 2), np.float32)
    x = np.stack([np.full((2, 2), 0.1), np.zeros((2, 2)), np.full((2, 2), np.nan)]).astype(np.float32)
    found = psnr(x, target)
    assert found[0] == pytest.approx(20, abs=1e-4) and found[1] == math.inf and found[2] == -math.inf
    assert psnr(x[:1] * 255, target[:1], data_range=255.0)[0] == pytest.approx(20, abs=1e-4)


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_assignment_costs_as_little_as_scipys(size, seed, tied):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 4, (size, size)).astype(np.float32) if tied else rng.random((size, size)).astype(np.float32)
    columns = np.asarray(_assignment(jnp.asarray(cost)))
    assert sorted(columns) == list(range(size))
    assert cost[np.arange(size), columns].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-5)


def test_greedy_matching_would_be_wrong():
    # Row 0 is nearest to reconstruction 0 and so is row 1, but together 1, 0 costs less.
    target = np.array([[1.0], [0.0]], np.float32)
    x = np.array([[0.4], [3.0]], np.float32)
    np.testing.assert_array_equal(match_rows(x, target), [1, 0])


def test_rows_are_found_again_under_jit_and_vmap():
    target = images(0, (2, 6, 12, 12, 1))
    orders = np.stack([np.random.default_rng(seed).permutation(6) for seed in range(2)])
    x = np.stack([target[i][order] for i, order in enumerate(orders)]) + 0.01 * images(1, target.shape)
    scores = jax.jit(jax.vmap(reconstruction))(x, target)
    for i in range(2):
        np.testing.assert_array_equal(scores.order[i], np.argsort(orders[i]))
        alone = reconstruction(x[i], target[i])
        for told, expected in zip(alone, jax.tree.map(lambda v, i=i: v[i], scores), strict=True):
            np.testing.assert_allclose(told, expected, rtol=1e-4)
        matched = x[i][np.argsort(orders[i])]
        np.testing.assert_allclose(alone.mse, ((matched - target[i]) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_a_reconstruction_that_is_not_finite_scores_worst_and_spoils_no_other():
    target = images(0, (3, 12, 12, 1))
    x = target[[2, 0, 1]].copy()
    x[1] = np.nan
    scores = reconstruction(x, target)
    np.testing.assert_array_equal(scores.order, [1, 2, 0])
    np.testing.assert_array_equal(scores.mse, [np.inf, 0, 0])
    assert scores.psnr[0] == -np.inf and scores.ssim[0] == 0
    np.testing.assert_allclose(scores.ssim[1:], 1, atol=1e-6)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_labels_count_whatever_their_order(pairs):
    labels, targets = (np.array(side, np.int32) for side in zip(*pairs, strict=True))
    common = sum((collections.Counter(labels.tolist()) & collections.Counter(targets.tolist())).values())
    assert label_accuracy(labels, targets) == pytest.approx(common / len(pairs))


@pytest.mark.usefixtures("x64")
def test_double_precision_stays():
    x, target = np.float64(images(0, (1, 12, 12, 1))), np.float64(images(1, (1, 12, 12, 1)))
    assert psnr(x, target).dtype == ssim(x, target).dtype == jnp.float64
    assert ssim(x, target)[0] == pytest.approx(oracle_ssim(x[0], target[0], 1.0), rel=1e-12)
    assert match_rows(x, target).dtype == jnp.int32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: psnr(np.zeros((2, 3)), np.zeros((2, 4))), ValueError, r"one shape .* got \(2, 3\) and \(2, 4\)"),
        (
            lambda: psnr(np.zeros(2), np.zeros(2), data_range=0.0),
            ValueError,
            "data_range must be above 0 and finite, got 0",
        ),
        (lambda: ssim(np.zeros((1, 10, 12, 1)), np.zeros((1, 10, 12, 1))), ValueError, "H, W >= 11, got the shape"),
        (lambda: match_rows(np.zeros(()), np.zeros(())), ValueError, "one shape of 1 axes or more"),
        (lambda: label_accuracy(np.zeros(2), np.zeros(2, int)), TypeError, "labels must be integers, got float"),
        (
            lambda: label_accuracy(np.zeros(2, int), np.zeros(3, int)),
            ValueError,
            r"must be \[B\], got \(2,\) and \(3,\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
