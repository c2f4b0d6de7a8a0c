"""Top-k by a threshold that a sample tells: about `k` numbers are sent, and how many is told.

Reference: Lin, Han, Mao, Wang, Dally, `Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed
Training <https://arxiv.org/abs/1712.01887>`_, 2018, which sends what exceeds the threshold of the top-k of a sample.

Exact selection reads the vector again and again. Here it is read twice, once for the sample and to count, once to take
what is sent, and both go along with what else is done to the update. So nothing here may loop over the vector: a loop,
even one of no turns, would have it copied.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.compress.codec import Codec, Compressor, Scope, ToldBits, lift
from cedarjax.compress.counting import count, count_finite, magnitude_keys
from cedarjax.compress.entropy import subset_entropy
from cedarjax.compress.packing import index_bits, pack_bits, unpack_bits
from cedarjax.compress.top_k import check_fraction, num_kept
from cedarjax.core.dtypes import accumulator

_MANTISSA_BITS = 7  # to which a threshold is looked up, beside all bits of the exponent: to 1 % of its magnitude
_LEAST_SAMPLE = 512
_LEAST_ABOVE = 10  # numbers of the sample that shall lie above the threshold, if nothing else is asked for
_DEVIATIONS = 6.0  # by which the count of a random sample may miss before places run out


class ToldPayload(NamedTuple):
    """What is sent of one vector."""

    num_sent: jax.Array
    """uint32 scalar, how many places are in use; no more is sent."""
    indices: jax.Array
    """uint32 words, `ceil(log2 d)` bits an index, in rising order; then 0."""
    values: jax.Array
    """`[places]`, in the dtype of the vector; then 0."""


class Sampling(NamedTuple):
    """How a vector of some length is sampled."""

    stride: int
    """One number in so many is looked at."""
    num_above: int
    """Numbers of the sample at or above the threshold."""
    num_places: int
    """Numbers that can be sent at most."""


def sampling(size: int, fraction: float, num_samples: int) -> Sampling:
    """How a vector is sampled.

    Args:
      size: `d`, at least 1.
      fraction: of the numbers that shall be sent, in (0, 1].
      num_samples: numbers to look at; all, if there are no more.

    Returns:
      A `Sampling`. A stride is odd, so that it meets all columns of a matrix.
    """
    stride = 1 if size <= num_samples else (size // num_samples) | 1
    num_above = max(1, round(num_kept(size, fraction) * -(-size // stride) / size))
    places = num_kept(size, fraction) * (1.0 + _DEVIATIONS / num_above**0.5)
    return Sampling(stride, num_above, min(size, math.ceil(places)))


def sampled_thresholds(vectors: list[jax.Array], fraction: float, num_samples: int) -> list[jax.Array]:
    """The threshold of each vector, all looked up at once: by halving, in samples side by side.

    Args:
      vectors: each `[d]` floats; dtypes and lengths may differ.
      fraction: of the numbers that shall reach the threshold, in (0, 1].
      num_samples: numbers of each to look at.

    Returns:
      For each a key as `magnitude_keys` makes them, above that of 0, so that zeros never reach it. The given part of
      the sample reaches it, if so many are not 0.
    """
    found: list[jax.Array] = [jnp.ones((), _key_dtype(vector)) for vector in vectors]
    groups: dict[jnp.dtype, list[int]] = {}
    for i, vector in enumerate(vectors):
        if num_kept(vector.shape[0], fraction) < vector.shape[0]:
            groups.setdefault(found[i].dtype, []).append(i)
    for group in groups.values():
        ways = [sampling(vectors[i].shape[0], fraction, num_samples) for i in group]
        samples = [_keys(vectors[i][:: way.stride]) for i, way in zip(group, ways, strict=True)]
        for i, key in zip(group, _quantiles(samples, [way.num_above for way in ways]), strict=True):
            found[i] = jnp.maximum(key, 1)
    return found


def _key_dtype(vector: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.int64 if accumulator(vector) == jnp.float64 else jnp.int32)


def _keys(vector: jax.Array) -> jax.Array:
    return magnitude_keys(lax.stop_gradient(vector.astype(accumulator(vector))))


def _quantiles(samples: list[jax.Array], goals: list[int]) -> list[jax.Array]:
    """Of each sample the key that so many reach, rounded down to a few bits, of which every turn settles one more."""
    found = [jnp.max(sample) for sample in samples]
    several = [i for i, goal in enumerate(goals) if goal > 1]
    if not several:
        return found
    width = max(samples[i].shape[0] for i in several)
    # Padding is -1 and reaches nothing.
    keys = jnp.stack([jnp.pad(samples[i], (0, width - samples[i].shape[0]), constant_values=-1) for i in several])
    wanted = jnp.asarray([float(goals[i]) for i in several], jnp.float32)
    top_bit = 8 * keys.dtype.itemsize - 2
    num_bits = jnp.finfo(jnp.float64 if keys.dtype.itemsize == 8 else jnp.float32).nexp + _MANTISSA_BITS

    def settle(turn: jax.Array, low: jax.Array) -> jax.Array:
        key = low + (jnp.ones((), keys.dtype) << (top_bit - turn).astype(keys.dtype))
        reached = jnp.sum((keys >= key[:, None]).astype(jnp.float32), axis=1)
        return jnp.where(reached >= wanted, key, low)

    settled = lax.fori_loop(0, num_bits, settle, jnp.zeros(len(several), keys.dtype))
    for row, i in enumerate(several):
        found[i] = settled[row]
    return found


class _Kept(NamedTuple):
    """What is sent of a vector."""

    mask: jax.Array
    """`[d]` bool."""
    num_sent: jax.Array
    """int32 scalar."""
    is_finite: jax.Array
    """bool scalar; where it is not, one number is sent and is NaN."""


def _kept(vector: jax.Array, threshold: jax.Array, num_places: int) -> _Kept:
    size = vector.shape[0]
    keys = _keys(vector)
    reaches = keys >= threshold
    number, is_finite = count_finite(reaches, vector.astype(accumulator(vector)))
    fits = number <= num_places
    end = jnp.where(is_finite, jnp.where(fits, size, num_places), 1)
    first = count(reaches[:num_places])
    num_sent = jnp.where(is_finite, jnp.where(fits, number, first), 1)
    least = jnp.where(is_finite, threshold, jnp.zeros_like(threshold))
    return _Kept((keys >= least) & (lax.iota(jnp.int32, size) < end), num_sent.astype(jnp.int32), is_finite)


def sampled_top_k(fraction: float, *, num_samples: int | None = None, scope: Scope = "leaf") -> Compressor:
    """Sends the numbers whose magnitude reaches that of the `fraction` largest of a sample, and how many they are.

    About `k = max(1, round(fraction d))` numbers, with a relative error of one over the root of the numbers of the
    sample above the threshold: a third for the default of ten, while `top_k` sends exactly `k` and takes several times
    as long. What is sent are the `n` largest, so it contracts: `|C(v) - v|^2 <= (1 - n / d) |v|^2`. Use it with error
    feedback.

    There are places for six standard deviations more than `k`. Should more numbers reach the threshold, as where many
    are equal or where a vector follows the stride of the sample, those are sent that are among the first numbers of the
    vector, as many as there are places.

    Args:
      fraction: of the numbers, in (0, 1].
      num_samples: numbers of each vector that are looked at, evenly spaced; by default so many that ten lie above the
        threshold, and 512 at least. Of a vector that has no more, all are looked at.
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; the count in as many bits as hold the places, `n ceil(log2 d)` bits for indices, and `n` numbers
      in the dtype of the parameters. Zeros are never sent. A vector that is not finite is sent as one NaN.

    Raises:
      ValueError: if `fraction` or `num_samples` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = sampled_top_k(0.5)
      >>> compressed, _ = compressor.compress(jnp.array([1.0, -3.0, 2.0, 0.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed), compressor.bits(compressed))  # 3 + 2 * (2 + 32)
      [ 0. -3.  2.  0.] 71
    """
    check_fraction(fraction)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    looked_at = max(_LEAST_SAMPLE, math.ceil(_LEAST_ABOVE / fraction)) if num_samples is None else num_samples

    def places(size: int) -> int:
        return sampling(size, fraction, looked_at).num_places if size else 0

    def told(num_sent: jax.Array, size: int, dtype: jnp.dtype) -> ToldBits:
        header, each = index_bits(places(size) + 1), index_bits(size) + 8 * dtype.itemsize
        return ToldBits(num_sent.astype(jnp.int32) * each + header, places(size) * each + header)

    def encode(vector: jax.Array, threshold: jax.Array) -> ToldPayload:
        size = vector.shape[0]
        kept = _kept(vector, threshold, places(size))
        (indices,) = jnp.nonzero(kept.mask, size=places(size), fill_value=size)
        there = indices < size
        indices = jnp.where(there, indices, 0).astype(jnp.uint32)
        taken = jnp.where(kept.is_finite, vector[indices], jnp.nan)
        values = jnp.where(there, taken, jnp.zeros((), vector.dtype))
        return ToldPayload(kept.num_sent.astype(jnp.uint32), pack_bits(indices, index_bits(size)), values)

    def decode(payload: ToldPayload, size: int) -> jax.Array:
        indices = unpack_bits(payload.indices, index_bits(size), payload.values.shape[0])
        return jnp.zeros(size, payload.values.dtype).at[indices].add(payload.values)

    def bits(payload: ToldPayload, size: int) -> ToldBits:
        return told(payload.num_sent, size, payload.values.dtype)

    def roundtrip(vector: jax.Array, threshold: jax.Array) -> tuple[jax.Array, ToldBits]:
        kept = _kept(vector, threshold, places(vector.shape[0]))
        taken = jnp.where(kept.is_finite, vector, jnp.nan)
        return jnp.where(kept.mask, taken, jnp.zeros((), vector.dtype)), told(
            kept.num_sent, vector.shape[0], vector.dtype
        )

    def entropy(payload: ToldPayload, size: int) -> jax.Array:
        header = float(index_bits(places(size) + 1))
        each = 8.0 * payload.values.dtype.itemsize
        return header + subset_entropy(size, payload.num_sent) + each * payload.num_sent.astype(jnp.float32)

    def prepare(vectors: list[jax.Array]) -> list[jax.Array]:
        return sampled_thresholds(vectors, fraction, looked_at)

    return lift(Codec(encode, decode, bits, roundtrip, entropy, prepare), scope)
