import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.distill import dsfl_bytes, fd_bytes, fedcache2_bytes, fedcache_bytes
from cedarjax.metrics import communication


def test_fedcache_by_hand():
    """7 samples of 3 classes, 5 related, embedded in 11 numbers: 7 * 11 * 4, 7 * 3 * 4, and 5 times that."""
    assert fedcache_bytes(7, 3, 5, 11) == (308, 84, 84, 420)
    assert fedcache_bytes(7, 3, 5, 11, num_epochs=2, itemsize=2) == (154, 84, 84, 420)


def test_python_integers_do_not_overflow():
    assert fedcache_bytes(10**9, 100, 16, 576).down_raw == 6_400_000_000_000


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_one_number_a_client(array):
    bytes_ = fedcache_bytes(array([7, 0], "int32"), 3, 5, 11)
    assert [x.tolist() for x in bytes_] == [[308, 0], [84, 0], [84, 0], [420, 0]]
    assert bytes_.up.dtype == "int32"
    assert communication(bytes_.up, download=0, full_upload=100).uploaded == 84


def test_the_relatives_by_hand():
    """Of 10 classes, 3 held: 3 means of 40 bytes and 2 bytes of bits up, 10 means and the bits down."""
    assert fd_bytes(3, 10) == (0, 122, 402, 402)
    assert dsfl_bytes(6, 10) == (0, 240, 240, 240)
    assert fedcache2_bytes(2, 5, 9) == (0, 80, 200, 200)
    assert [x.tolist() for x in fd_bytes(np.array([3, 0]), 10)] == [[0, 0], [122, 2], [402, 402], [402, 402]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fedcache_bytes(-1, 3, 5, 11), "num_rows must be at least 0, got -1"),
        (lambda: fedcache_bytes(1, 0, 5, 11), "num_classes must be at least 1, got 0"),
        (lambda: fedcache_bytes(1, 3, 0, 11), "num_related must be at least 1, got 0"),
        (lambda: fedcache_bytes(1, 3, 5, 0), "embedding_dim must be at least 1, got 0"),
        (lambda: fedcache_bytes(1, 3, 5, 11, num_epochs=0), "num_epochs must be at least 1, got 0"),
        (lambda: fd_bytes(-1, 3), "num_held must be at least 0, got -1"),
        (lambda: dsfl_bytes(-1, 3), "num_public must be at least 0, got -1"),
        (lambda: fedcache2_bytes(1, -1, 3), "num_received must be at least 0, got -1"),
    ],
)
def test_counts_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
