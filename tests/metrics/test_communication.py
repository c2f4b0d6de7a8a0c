import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.metrics import Communication, communication


def test_counts_by_hand():
    uploaded = np.array([[100, 60, 0], [100, 100, 7]], np.int32)
    present = np.array([[1, 1, 1], [0, 1, 1]])
    told = communication(uploaded, download=120, full_upload=100, weights=present)
    assert told == Communication(uploaded=267, downloaded=600, saved=40 + 100 + 93)
    rounds = [
        communication(u, download=120, full_upload=100, weights=w) for u, w in zip(uploaded, present, strict=True)
    ]
    assert rounds[0].merge(rounds[1]) == told


def test_one_mask_for_all_rounds():
    told = communication(np.full((3, 2), 10), download=1, full_upload=12, weights=np.array([0.5, 0.0]))
    assert told == Communication(uploaded=30, downloaded=3, saved=6)


def test_does_not_overflow():
    size = 2**31 - 1
    told = communication(jnp.full((100, 50), size, jnp.int32), download=4 * size, full_upload=2 * size)
    assert told == Communication(uploaded=5000 * size, downloaded=20000 * size, saved=5000 * size)
    assert all(type(value) is int for value in told)
    long = Communication(2**63, 2**63, 2**63)
    assert long.merge(long) == Communication(2**64, 2**64, 2**64)


def test_what_an_upload_costs_beyond_a_whole_one_counts_against():
    assert communication([101], download=0, full_upload=100).saved == -1


def test_nobody_sends_nothing():
    nothing = communication(np.array([5, -5]), download=9, full_upload=9, weights=np.zeros(2))
    assert nothing == Communication() == communication([], download=9, full_upload=9)


@pytest.mark.parametrize(
    ("uploaded", "options", "error", "message"),
    [
        (np.array([1.0]), {}, TypeError, "uploaded must hold integers, got dtype float64"),
        (np.array([True]), {}, TypeError, "uploaded must hold integers, got dtype bool"),
        ([5, -3], {}, ValueError, "uploaded must be at least 0, got -3"),
        ([5], {"download": -1}, ValueError, "download must be at least 0, got -1"),
        ([5], {"full_upload": -1}, ValueError, "full_upload must be at least 0, got -1"),
        ([5, 5], {"weights": [1.0]}, ValueError, r"weights must have the shape \(2,\)"),
    ],
)
def test_bad_input(uploaded, options, error, message):
    with pytest.raises(error, match=message):
        communication(uploaded, **({"download": 1, "full_upload": 1} | options))
