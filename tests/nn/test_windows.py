import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from cedarjax.nn.windows import lay_windows, pad, places


@given(
    length=st.integers(1, 12),
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "SAME_LOWER", "VALID"]) | st.tuples(st.integers(-2, 3), st.integers(-2, 3)),
)
def test_windows_lie_where_xla_lays_them(length, size, stride, dilation, padding):
    pads = padding if isinstance(padding, str) else [padding]
    if not isinstance(padding, str) and length + sum(padding) < 0:
        return
    windows = lay_windows((length,), (size,), (stride,), pads, (dilation,))
    x = np.arange(1.0, length + 1.0, dtype=np.float32).reshape(1, length, 1)
    found = np.zeros((size, windows.out[0]), np.float32)
    for place in range(size):
        kernel = (jnp.arange(size) == place).astype(jnp.float32).reshape(1, 1, size)
        row = lax.conv_general_dilated(x.transpose(0, 2, 1), kernel, (stride,), pads, None, (dilation,))
        assert row.shape[-1] == windows.out[0]
        found[place] = row.ravel()
    if windows.out[0]:
        slices = places(pad(jnp.asarray(x), windows.pads), windows)
        np.testing.assert_array_equal(jnp.stack(slices)[:, 0, :, 0], found)


def test_positions_count_fastest_along_the_last_axis():
    windows = lay_windows((4, 4), (2, 2), (1, 1), "VALID")
    assert windows.positions() == [(0, 0), (0, 1), (1, 0), (1, 1)] and windows.out == (3, 3)


def test_names_of_paddings_are_those_of_lax():
    with pytest.raises(RuntimeError, match="padding"):
        lay_windows((4,), (2,), (1,), "WIDE")
