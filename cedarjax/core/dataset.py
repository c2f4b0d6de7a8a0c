"""A federation on the device, and the cohorts that are drawn from it inside jit.

The examples of all clients lie one after another in flat arrays, with the offset of every client beside them: ragged
clients cost no padding in storage. Only the clients of a cohort are gathered into padded rows, by index, inside the
compiled round. The number of clients `N` and the padded length `M` are static; everything else is data, so one
compilation serves every round of a run. `cedarjax.data` builds federations on the host.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cedarjax.core.types import ClientData, Cohort, PyTree

ABSENT_ID = 2**31 - 1
"""Client id of an absent row: out of bounds for every array, so that a scatter with `mode="drop"` skips it.

A negative id would wrap around and overwrite the last client. A gather at this id needs `mode="clip"` to stay finite.
"""

_WEIGHTINGS = ("examples", "uniform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FederatedDataset:
    """All clients' examples, client after client, as one pytree.

    Build one with `cedarjax.data.federated_dataset` or `cedarjax.data.from_partition`, which check their input. Clients
    are numbered `0..N-1`; client `i` owns rows `[offsets[i], offsets[i + 1])`.

    Attributes:
      examples: leaves `[n, ...]`, for example `{"x": [n, ...], "y": [n]}`.
      offsets: `[N + 1]` int32, from 0 to `n`, strictly increasing.
      num_support: `[N]` int32; the first `num_support[i]` rows of client `i` are its support set. Equal to `counts`
        where nothing is split.
      max_examples: static, the length `M` that gathered clients are padded to; at least the largest count.
    """

    examples: PyTree
    offsets: jax.Array
    num_support: jax.Array
    max_examples: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """Clients in the federation, `N`; static."""
        return self.offsets.shape[0] - 1

    @property
    def num_examples(self) -> int:
        """Examples of all clients together, `n`; static."""
        return jax.tree.leaves(self.examples)[0].shape[0]

    @property
    def counts(self) -> jax.Array:
        """`[N]` int32, the examples of each client."""
        return self.offsets[1:] - self.offsets[:-1]


def take_clients(
    dataset: FederatedDataset,
    client_ids: jax.Array,
    *,
    weighting: str = "examples",
    byzantine: jax.Array | None = None,
    present: jax.Array | None = None,
) -> Cohort:
    """Gathers the named clients into padded rows; works inside jit and vmap.

    A row is absent where `present` is False or its id lies outside `[0, N)`. An absent row has zeros for data, 0
    examples, weight 0 and the id `ABSENT_ID`, so it counts for nothing and a scatter with `mode="drop"` skips it.

    Args:
      dataset: the federation.
      client_ids: `[C]` integers.
      weighting: `"examples"` weighs a client by its number of examples, `"uniform"` by 1.
      byzantine: `[N]` bool, the malicious clients of the federation; its rows are gathered like the data.
      present: `[C]` bool, the rows that take part; all of them when None.

    Returns:
      A `Cohort` whose data is a `ClientData` with leaves `[C, M, ...]`, zeros beyond a client's last example, and whose
      state is `()`.

    Raises:
      ValueError: if a shape or `weighting` does not fit.
      TypeError: if `client_ids` are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset({"x": jnp.array([1.0, 2.0, 3.0])}, client_id=[0, 0, 1])
      >>> cohort = take_clients(dataset, jnp.array([1, 0]))
      >>> cohort.data.examples["x"].tolist(), cohort.weights.tolist()
      ([[3.0, 0.0], [1.0, 2.0]], [1.0, 2.0])
    """
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"weighting must be one of {_WEIGHTINGS}, got {weighting!r}.")
    client_ids = jnp.asarray(client_ids)
    if client_ids.ndim != 1:
        raise ValueError(f"client_ids must have shape [C], got {client_ids.shape}.")
    if not jnp.issubdtype(client_ids.dtype, jnp.integer):
        raise TypeError(f"client_ids must be integers, got {client_ids.dtype}.")
    num_clients = dataset.num_clients
    present = jnp.ones(client_ids.shape, bool) if present is None else jnp.asarray(present)
    if present.shape != client_ids.shape:
        raise ValueError(f"present must have the shape of client_ids, {client_ids.shape}, got {present.shape}.")
    present = present.astype(bool) & (client_ids >= 0) & (client_ids < num_clients)
    rows = jnp.where(present, client_ids, 0).astype(jnp.int32)

    counts = jnp.where(present, dataset.counts[rows], 0)
    columns = jnp.arange(dataset.max_examples, dtype=jnp.int32)[None, :]
    index = jnp.where(columns < counts[:, None], dataset.offsets[rows][:, None] + columns, dataset.num_examples)
    data = ClientData(
        examples=jax.tree.map(lambda leaf: leaf.at[index].get(mode="fill", fill_value=0), dataset.examples),
        num_examples=counts,
        num_support=jnp.where(present, dataset.num_support[rows], 0),
    )
    if byzantine is not None:
        byzantine = jnp.asarray(byzantine)
        if byzantine.shape != (num_clients,):
            raise ValueError(f"byzantine must have shape [N] = [{num_clients}], got {byzantine.shape}.")
        byzantine = byzantine[rows].astype(bool) & present
    return Cohort(
        data=data,
        weights=(counts if weighting == "examples" else present).astype(jnp.float32),
        client_id=jnp.where(present, rows, ABSENT_ID),
        byzantine=byzantine,
    )


def sample_cohort(
    key: jax.Array,
    dataset: FederatedDataset,
    num_clients: int,
    *,
    weighting: str = "examples",
    byzantine: jax.Array | None = None,
) -> Cohort:
    """Draws clients uniformly without replacement; works inside jit and vmap.

    The clients with the smallest of `N` random numbers are taken, so the cost is that of a selection and not of a sort.
    With `num_clients == N` everybody takes part, in the order of the ids, and the key is not used.

    Args:
      key: PRNG key; equal keys give the same cohort.
      dataset: the federation.
      num_clients: static size `C` of the cohort, between 1 and `N`.
      weighting: as in `take_clients`.
      byzantine: as in `take_clients`.

    Returns:
      A `Cohort` of `num_clients` distinct clients, none of them absent.

    Raises:
      ValueError: if `num_clients` is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset({"x": jnp.array([1.0, 2.0, 3.0])}, client_id=[0, 1, 2])
      >>> sample_cohort(jax.random.key(0), dataset, 2).client_id.shape
      (2,)
    """
    total = dataset.num_clients
    if not 1 <= num_clients <= total:
        raise ValueError(f"num_clients must satisfy 1 <= num_clients <= {total} (all clients), got {num_clients}.")
    if num_clients == total:
        client_ids = jnp.arange(total, dtype=jnp.int32)
    else:
        # float32 keeps small integers exact, so ties among the smallest of the 32-bit draws are as rare as the bits
        # allow.
        draws = jax.random.bits(key, (total,), jnp.uint32).astype(jnp.float32)
        client_ids = jax.lax.top_k(-draws, num_clients)[1]
    return take_clients(dataset, client_ids, weighting=weighting, byzantine=byzantine)


def pad_cohort(cohort: Cohort, num_clients: int) -> Cohort:
    """Appends absent rows until the cohort has `num_clients` rows, for instance a multiple of the devices or the chunk.

    The new rows repeat the first ones, so that they hold finite values wherever the cohort does. They have weight 0 and
    the id `ABSENT_ID` and are not byzantine: no aggregation reads them, and `.at[client_id].set(..., mode="drop")`
    leaves every stored client state alone.

    Args:
      cohort: leaves `[C, ...]`.
      num_clients: static number of rows wanted, at least `C`.

    Returns:
      A `Cohort` with leaves `[num_clients, ...]`, the given rows first and unchanged.

    Raises:
      ValueError: if `num_clients` is smaller than `C`, the cohort is empty, or a leaf has not `C` rows.

    Example:
      >>> import jax.numpy as jnp
      >>> cohort = Cohort(data=jnp.array([5.0, 6.0]), weights=jnp.ones(2), client_id=jnp.arange(2))
      >>> padded = pad_cohort(cohort, 3)
      >>> padded.data.tolist(), padded.weights.tolist()
      ([5.0, 6.0, 5.0], [1.0, 1.0, 0.0])
    """
    size = cohort.weights.shape[0]
    if size == 0 or num_clients < size:
        raise ValueError(f"num_clients must satisfy 1 <= C <= num_clients, got C = {size} and {num_clients}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cohort):
        if leaf.shape[:1] != (size,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"cohort{name} must have C = {size} rows like its weights, got shape {leaf.shape}.")
    if num_clients == size:
        return cohort  # a gather of all rows would be a copy
    rows = jnp.arange(num_clients, dtype=jnp.int32)
    padded = jax.tree.map(lambda leaf: leaf[rows % size], cohort)
    real = rows < size
    return padded._replace(
        weights=jnp.where(real, padded.weights, jnp.zeros_like(padded.weights)),
        client_id=jnp.where(real, padded.client_id, jnp.full_like(padded.client_id, ABSENT_ID)),
        byzantine=None if padded.byzantine is None else padded.byzantine & real,
    )
