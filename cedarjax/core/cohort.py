"""`cohort_map`: lifts a function of one client to the client axis.

How it is lifted (all at once, in chunks, in a loop, over the devices of a mesh) is a choice of speed and memory and
never of results: every client's numbers are the same to float32 rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from cedarjax.core.axis import num_clients
from cedarjax.core.chunks import ChunkSize, check_chunk_size, resolve_chunk_size
from cedarjax.core.types import PyTree


class MapFn(Protocol):
    """`map_fn(fun, shared, *per_client)`: `fun(shared, *one_client)` for every client, results stacked `[C, ...]`."""

    def __call__(self, fun: Callable[..., PyTree], shared: PyTree, *per_client: PyTree) -> PyTree:
        """Results of all clients, leaves `[C, ...]`."""
        ...


def client_mesh(mesh: Mesh) -> Mesh:
    """The same devices with automatic axes: the sharding of the client axis is ours to say, the rest is the compiler's.

    Args:
      mesh: any mesh; `jax.make_mesh` gives explicit axes unless told otherwise.

    Returns:
      A mesh whose axes are all `AxisType.Auto`.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _on_device(chunk_size: int | None, fun: Callable[..., PyTree], shared: PyTree, *per_client: PyTree) -> PyTree:
    count = num_clients(per_client)
    if chunk_size is None or 1 < count <= chunk_size:
        return jax.vmap(lambda *one: fun(shared, *one))(*per_client)
    if chunk_size == 1 or count == 1:
        return jax.lax.map(lambda one: fun(shared, *one), per_client)
    return _in_chunks(lambda *one: fun(shared, *one), per_client, count, chunk_size)


def _in_chunks(fun: Callable[..., PyTree], per_client: tuple[PyTree, ...], count: int, chunk_size: int) -> PyTree:
    """A scan over vmapped chunks, and one vmap over the clients that are left.

    Chunks are cut out by hand: XLA:CPU may copy all clients' data where they are reshaped to `[chunks, size, ...]`.
    """

    def chunk(start: jax.Array | int, size: int) -> PyTree:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), per_client)
        return jax.vmap(fun)(*part)

    whole = count - count % chunk_size
    starts = jnp.arange(0, whole, chunk_size, dtype=jnp.int32)
    _, results = jax.lax.scan(lambda carry, start: (carry, chunk(start, chunk_size)), None, starts)
    results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
    if whole == count:
        return results
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), results, chunk(whole, count - whole))


@dataclasses.dataclass(frozen=True)
class CohortMap:
    """A `MapFn` from `cohort_map`, which says what its fields mean; on a mesh, aggregators are told of it."""

    chunk_size: ChunkSize = None
    """Clients per chunk on each device, or None for all."""
    mesh: Mesh | None = None
    """Mesh that the client axis lies on, or None for one device."""

    def __call__(self, fun: Callable[..., PyTree], shared: PyTree, *per_client: PyTree) -> PyTree:
        """Results of all clients, leaves `[C, ...]`."""
        chunk_size = resolve_chunk_size(self.chunk_size, fun, shared, per_client, self.mesh)
        if self.mesh is None:
            return _on_device(chunk_size, fun, shared, *per_client)
        count = num_clients(per_client)
        padded = -(-count // self.mesh.size) * self.mesh.size
        if padded != count:
            rows = jnp.minimum(jnp.arange(padded), count - 1)
            per_client = jax.tree.map(lambda x: x[rows], per_client)
        # check_vma=False keeps the gradient of the replicated `shared` local: JAX would sum it over devices otherwise.
        results = jax.shard_map(
            lambda shared, per_client: _on_device(chunk_size, fun, shared, *per_client),
            mesh=self.mesh,
            in_specs=(P(), P(self.mesh.axis_names)),
            out_specs=P(self.mesh.axis_names),
            check_vma=False,
        )(shared, per_client)
        return results if padded == count else jax.tree.map(lambda x: x[:count], results)


def cohort_map(chunk_size: ChunkSize = None, mesh: Mesh | None = None) -> CohortMap:
    """How the clients of a cohort are laid out on the hardware.

    `chunk_size=None` vmaps the whole cohort, which is what accelerators want; `chunk_size=1` loops over clients, whose
    weights then stay in cache, which is what CPUs want; `k` scans over chunks of `k` vmapped clients, which bounds
    memory; `"auto"` chooses from the hardware and from what one client holds in memory (`core.chunks`). Under a mesh
    the client axis is sharded over all its devices and chunks are per device; gradients taken inside are each client's
    own.

    Args:
      chunk_size: clients per chunk on each device, None for all, or `"auto"`.
      mesh: mesh whose axes, all of them, carry the client axis; or None for one device. Its axis types
        do not matter, but arrays that lie on a mesh beforehand must lie on one with automatic axes.

    Returns:
      A `MapFn`. A cohort that does not divide over the mesh is filled up by repeating its last client and cut again.

    Raises:
      ValueError: if `chunk_size` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> double = lambda shared, x: shared * x
      >>> cohort_map(chunk_size=2)(double, jnp.float32(2.0), jnp.arange(5, dtype=jnp.float32))
      Array([0., 2., 4., 6., 8.], dtype=float32)
    """
    check_chunk_size(chunk_size)
    return CohortMap(chunk_size, None if mesh is None else client_mesh(mesh))
