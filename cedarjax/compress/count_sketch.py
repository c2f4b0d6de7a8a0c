"""The count sketch: a small linear image of a vector in which its large numbers can be found.

Reference: Charikar, Chen and Farach-Colton, `Finding Frequent Items in Data Streams
<https://doi.org/10.1016/S0304-3975(03)00400-6>`_, 2004. The hash functions are random bits of a seed that all clients
share, independent for every number and row, so sketches of clients can be added.
"""

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.core.batches import check_positive
from cedarjax.core.dtypes import accumulator


def _hashes(length: int, num_rows: int, num_cols: int, seed: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Column and sign bit of every number in every row, `[num_rows, length]`."""
    words = jax.random.bits(jax.random.key(seed, impl="threefry2x32"), (num_rows, length), jnp.uint32)
    return ((words >> 1) % jnp.uint32(num_cols)).astype(jnp.int32), words & 1


def _signed(values: jax.Array, sign_bits: jax.Array) -> jax.Array:
    return jnp.where(sign_bits > 0, -values, values)


def sketch(vector: jax.Array, *, num_rows: int, num_cols: int, seed: int | jax.Array = 0) -> jax.Array:
    """Count sketch of a vector, `S[j, c] = sum over i with h_j(i) = c of s_j(i) v_i`.

    Each row `j` throws every number with a random sign into one of its cells. It is linear: the sketch of a sum is the
    sum of the sketches.

    Args:
      vector: `[d]` floats.
      num_rows: independent rows.
      num_cols: cells of a row.
      seed: seed of the hash functions.

    Returns:
      `[num_rows, num_cols]`, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> table = sketch(jnp.array([0.0, 0.0, 5.0, 0.0]), num_rows=3, num_cols=8)
      >>> print(jnp.abs(table).sum(axis=1), unsketch(table, 4)[2])
      [5. 5. 5.] 5.0
    """
    check_positive(num_rows=num_rows, num_cols=num_cols)
    vector = vector.astype(accumulator(vector))
    columns, sign_bits = _hashes(vector.size, num_rows, num_cols, seed)

    def row(columns: jax.Array, sign_bits: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(_signed(vector, sign_bits), columns, num_segments=num_cols)

    return jax.vmap(row)(columns, sign_bits)


def unsketch(table: jax.Array, length: int, *, seed: int | jax.Array = 0) -> jax.Array:
    """Estimates of all numbers of a sketched vector, `median_j s_j(i) S[j, h_j(i)]`.

    Each row's estimate is unbiased with a variance of at most `|v|^2 / num_cols`, and its error is symmetric, so the
    median is unbiased too. A row is off by more than `sqrt(3 / num_cols) |v|` in at most one of three cases, so the
    probability that a median is falls exponentially with the number of rows.

    Args:
      table: `[num_rows, num_cols]`, from `sketch`, or a sum of such.
      length: `d`.
      seed: that of the sketch.

    Returns:
      `[d]`, in the dtype of the table. With an even number of rows the median is the mean of the middle two.
    """
    num_rows, num_cols = table.shape
    columns, sign_bits = _hashes(length, num_rows, num_cols, seed)
    estimates = _signed(jnp.take_along_axis(table, columns, axis=1), sign_bits)
    return _median(list(estimates))


def _median(rows: list[jax.Array]) -> jax.Array:
    """Median of each place, by a network of comparisons: a sort along so short an axis is slow on a CPU."""
    count = len(rows)
    for turn in range(count):
        for i in range(turn % 2, count - 1, 2):
            rows[i], rows[i + 1] = jnp.minimum(rows[i], rows[i + 1]), jnp.maximum(rows[i], rows[i + 1])
    return rows[count // 2] if count % 2 else 0.5 * (rows[count // 2 - 1] + rows[count // 2])


def count_sketch(num_rows: int, num_cols: int, *, seed: int | jax.Array = 0, scope: Scope = "model") -> Compressor:
    """Count sketch of the update; what is decompressed are the estimates of all its numbers.

    The sketch is linear and all clients share its hash functions, so compressed updates may be added and averaged
    before they are decompressed: `send_compressed` uploads them, `fetchsgd` reads them. On its own it is unbiased, with
    an error of up to `|v|^2 / num_cols` for every number: the estimates are of use where few numbers are large.

    Args:
      num_rows: independent rows, at least 1; 5 or so, an odd number.
      num_cols: cells of a row, at least 1; several times the number of large numbers.
      seed: seed of the hash functions, shared by all clients and all rounds. A traced scalar is allowed.
      scope: `"model"` for one sketch of all parameters, `"leaf"` for one of each leaf.

    Returns:
      A `Compressor` without a state that ignores its key. Only the cells are sent.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = count_sketch(5, 64)
      >>> delta = {"w": jnp.zeros(1000).at[jnp.array([3, 500])].set(jnp.array([7.0, -4.0]))}
      >>> compressed, _ = compressor.compress(delta, (), jax.random.key(0))
      >>> print(compressor.bits(compressed), compressor.decompress(compressed)["w"][jnp.array([3, 500])])
      10240 [ 7. -4.]
    """
    check_positive(num_rows=num_rows, num_cols=num_cols)

    def encode(vector: jax.Array, key: jax.Array) -> jax.Array:
        del key
        return sketch(vector, num_rows=num_rows, num_cols=num_cols, seed=seed)

    def decode(table: jax.Array, length: int) -> jax.Array:
        return unsketch(table, length, seed=seed)

    def bits(table: jax.Array, length: int) -> int:
        del length
        return 8 * table.dtype.itemsize * num_rows * num_cols

    return lift(Codec(encode, decode, bits), scope)
