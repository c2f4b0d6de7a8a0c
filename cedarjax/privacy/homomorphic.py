"""Weighted sums of encrypted updates (CKKS), on the host, through TenSEAL.

Reference: Cheon et al., `Homomorphic Encryption for Arithmetic of Approximate Numbers
<https://eprint.iacr.org/2016/421>`_, 2017; `TenSEAL <https://arxiv.org/abs/2104.03152>`_, 2021. Clients encrypt their
updates, the server multiplies ciphertexts by weights and adds them without a key to read them, and whoever holds the
secret key decrypts the sum alone. All clients share that key here, so a client that listens to another's upload can
read it: it is the server that is kept from reading. Unlike secure aggregation nothing has to be recovered when a client
drops out; the price is ciphertexts of fourteen times the size of float32 and more, and an approximate sum.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.axis import by_layer, claimed_weights, num_clients
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.names import leaf_names
from cedarjax.core.trees import finite_rows
from cedarjax.core.types import PyTree


class EncryptedSumInfo(NamedTuple):
    """What an encrypted sum took."""

    upload_bytes: int
    """Size of one client's ciphertexts."""
    plain_bytes: int
    """Size of one client's update as it is."""
    num_ciphertexts: int
    """Ciphertexts that one client sends, of at most `poly_modulus_degree / 2` numbers each; 0 if nobody is present."""
    nonfinite: list[bool]
    """Whether each client was left out because a number of its was not finite."""


def _tenseal() -> ModuleType:
    try:
        import tenseal
    except ImportError as error:
        raise ImportError("Encrypted sums need TenSEAL: pip install 'cedarjax[he]'.") from error
    return tenseal


def ckks_context(
    *,
    poly_modulus_degree: int = 8192,
    coeff_mod_bit_sizes: Sequence[int] = (60, 40, 60),
    scale_bits: int = 40,
) -> Any:
    """Keys and parameters, made once.

    The defaults have room for one multiplication, by the weight, with some 20 bits of numbers above and 30 below the
    point, at 128 bits of security by the tables that TenSEAL (SEAL) enforces.

    Args:
      poly_modulus_degree: power of two; half as many numbers fit into a ciphertext.
      coeff_mod_bit_sizes: sizes of the primes of the modulus; at least three for one multiplication.
      scale_bits: bits behind the point; those of the middle primes.

    Returns:
      A `tenseal.Context` that holds the secret key.

    Raises:
      ImportError: if TenSEAL is not installed.
      ValueError: if the parameters are not those of a CKKS context, or insecure.
    """
    tenseal = _tenseal()
    sizes = tuple(coeff_mod_bit_sizes)
    if len(sizes) < 3:
        raise ValueError(f"coeff_mod_bit_sizes must hold at least 3 primes for a weighted sum, got {sizes}.")
    if not 0 < scale_bits < sizes[0]:
        raise ValueError(
            f"scale_bits must be positive and below coeff_mod_bit_sizes[0] = {sizes[0]}, got {scale_bits}."
        )
    try:
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=poly_modulus_degree, coeff_mod_bit_sizes=list(sizes)
        )
    except ValueError as error:
        raise ValueError(
            f"poly_modulus_degree and coeff_mod_bit_sizes must be parameters of at least 128 bits of security, "
            f"got {poly_modulus_degree} and {sizes}: {error}."
        ) from error
    context.global_scale = 2.0**scale_bits
    return context


class EncryptedRows(NamedTuple):
    """A decrypted sum of vectors, and what it took."""

    total: list[float]
    """`D` numbers."""
    upload_bytes: int
    """Size of one vector's ciphertexts."""
    num_ciphertexts: int
    """Ciphertexts of one vector."""


def encrypted_sum_of_rows(rows: Sequence[Any], weights: Sequence[float], context: Any) -> EncryptedRows:
    """`sum_i w_i x_i` of vectors, each encrypted, by a server that has no key to read them.

    Args:
      rows: vectors of `D` floats on the host, at least one.
      weights: as many numbers.
      context: from `ckks_context`.

    Returns:
      `EncryptedRows`.

    Raises:
      ImportError: if TenSEAL is not installed.
      ValueError: if the sum could be too large for the context.
    """
    tenseal = _tenseal()
    largest = sum(abs(w) * float(abs(row).max(initial=0.0)) for w, row in zip(weights, rows, strict=True))
    last = context.seal_context().data.last_context_data().total_coeff_modulus_bit_count()
    room = 2.0 ** (last - 1) / context.global_scale
    if largest >= room:
        raise ValueError(
            f"updates must satisfy sum_i weights_i * max|updates_i| < {room:g}, the room that context has above the "
            f"point, got {largest:g}. Scale them down, or give a context with a larger coeff_mod_bit_sizes[0]."
        )
    public = context.copy()
    public.make_context_public()
    size, piece = len(rows[0]), context_slots(context)
    total: list[float] = []
    upload_bytes = 0
    for start in range(0, size, piece):
        sum_of_piece, most_bytes = None, 0
        for row, weight in zip(rows, weights, strict=True):
            sent = tenseal.ckks_vector(context, row[start : start + piece].tolist()).serialize()
            most_bytes = max(most_bytes, len(sent))
            # The server has the ciphertext and the public part of the context.
            term = tenseal.ckks_vector_from(public, sent) * weight
            sum_of_piece = term if sum_of_piece is None else sum_of_piece + term
        assert sum_of_piece is not None
        sum_of_piece.link_context(context)
        total += sum_of_piece.decrypt()
        upload_bytes += most_bytes
    return EncryptedRows(total, upload_bytes, -(-size // piece))


def encrypted_weighted_sum(
    updates: PyTree, weights: jax.Array | None = None, *, context: Any = None
) -> tuple[PyTree, EncryptedSumInfo]:
    """`sum_i w_i x_i` of updates that the server never sees in the clear.

    Every client's numbers are laid end to end and encrypted in pieces of `poly_modulus_degree / 2`. The server works on
    the serialised ciphertexts with the public part of the context. Runs on the host and cannot be traced.

    Args:
      updates: tree with leaves `[C, ...]` of floats.
      weights: `[C]`, at least 0; default: 1. A client of weight 0 is absent, and what it holds is not read.
      context: from `ckks_context`; default: a fresh one.

    Returns:
      Tree with leaves `[...]` in the dtypes of `updates`, within about 1e-6 of `sum_i w_i max|x_i|` with the default
      context, and an `EncryptedSumInfo`. A client whose update is not finite is absent.

    Raises:
      ImportError: if TenSEAL is not installed.
      TypeError: if the updates are the rows of a pre-aggregator or do not hold floats.
      ValueError: if shapes disagree, a weight is negative or not finite, or the sum could be too large for the context.

    Example:
      >>> import jax.numpy as jnp, pytest
      >>> _ = pytest.importorskip("tenseal")
      >>> updates = {"a": jnp.array([[1.0, 2.0], [3.0, -2.0]])}
      >>> total, info = encrypted_weighted_sum(updates, jnp.array([1.0, 0.5]))
      >>> print(total["a"].round(4), info.num_ciphertexts)
      [2.5 1. ] 1
    """
    if isinstance(updates, Mixture):
        raise TypeError("updates must be the clients' own, got rows that a pre-aggregator made of them.")
    updates = dense(updates)
    count = num_clients(updates)
    leaves = jax.tree.leaves(updates)
    for name, leaf in zip(leaf_names(updates), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"updates must hold floats, got {leaf.dtype} for {name!r}.")
    if by_layer(updates, weights):
        raise ValueError("weights must be one [C] vector: a ciphertext holds numbers of several layers.")
    claimed = [float(w) for w in claimed_weights(updates, weights)]
    if not all(0 <= w < float("inf") for w in claimed):
        raise ValueError(f"weights must be at least 0 and finite, got {claimed}.")
    finite = finite_rows(updates).tolist()
    present = [i for i in range(count) if claimed[i] > 0 and finite[i]]

    context = ckks_context() if context is None else context
    dtype = accumulator(*leaves)
    rows = [jax.device_get(jnp.concatenate([x[i].astype(dtype).reshape(-1) for x in leaves])) for i in present]
    size = sum(leaf.size // count for leaf in leaves)
    told = EncryptedRows([0.0] * size, 0, 0)
    if present:
        told = encrypted_sum_of_rows(rows, [claimed[i] for i in present], context)
    info = EncryptedSumInfo(
        upload_bytes=told.upload_bytes,
        plain_bytes=sum(leaf.nbytes // count for leaf in leaves),
        num_ciphertexts=told.num_ciphertexts,
        nonfinite=[w > 0 and not f for w, f in zip(claimed, finite, strict=True)],
    )
    return _in_shape(told.total, updates), info


def context_slots(context: Any) -> int:
    """Numbers that fit into a ciphertext.

    Args:
      context: from `ckks_context`.

    Returns:
      `poly_modulus_degree / 2`.
    """
    return context.seal_context().data.key_context_data().parms().poly_modulus_degree() // 2


def _in_shape(numbers: list[float], updates: PyTree) -> PyTree:
    """Numbers end to end as one client's update."""
    leaves, structure = jax.tree.flatten(updates)
    shaped, start = [], 0
    for leaf in leaves:
        end = start + leaf.size // leaf.shape[0]
        shaped.append(jnp.asarray(numbers[start:end], leaf.dtype).reshape(leaf.shape[1:]))
        start = end
    return jax.tree.unflatten(structure, shaped)
