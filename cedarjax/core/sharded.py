"""Reductions over clients that lie on a mesh: what each device sums of its own clients, and one all-reduce.

Left to the compiler, a sum that guards against NaN takes a second all-reduce for the guard, and inner products between
clients gather all updates on every device. Said by hand, a sum is one all-reduce of `D` numbers, and inner products
exchange columns for rows, so that each device has a share of the parameters of all clients: `C D / n` numbers each way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cedarjax.core.lowrank.node import LowRank, is_low_rank
from cedarjax.core.types import PyTree


def divides(mesh: Mesh | None, num_clients: int) -> bool:
    """Whether there is more than one device and each has as many clients.

    Args:
      mesh: the mesh whose axes, all of them, carry the client axis, or None.
      num_clients: clients in the cohort.

    Returns:
      False where the reductions are left to the compiler.
    """
    return mesh is not None and mesh.size > 1 and num_clients % mesh.size == 0


def all_reduced(fun: Callable[..., PyTree], mesh: Mesh, *per_client: PyTree) -> PyTree:
    """`fun` of each device's clients, summed over devices.

    Args:
      fun: called with what is held of `per_client` on one device.
      mesh: as in `divides`.
      *per_client: leaves `[C, ...]`, `C` a multiple of the devices.

    Returns:
      The sums, the same on all devices.
    """
    run = jax.shard_map(
        lambda *own: lax.psum(fun(*own), mesh.axis_names),
        mesh=mesh,
        in_specs=(P(mesh.axis_names),) * len(per_client),
        out_specs=P(),
        check_vma=False,
    )
    return run(*per_client)


def share_of_parameters(updates: PyTree, mesh: Mesh) -> PyTree:
    """Inside `all_reduced`: in place of all parameters of a device's clients, its share of the parameters of all.

    Args:
      updates: leaves `[C / n, ...]`.
      mesh: as in `divides`.

    Returns:
      Leaves `[C, K]`, or `LowRank` with a share of the matrix's rows; the shares are filled up with zeros.
    """

    def exchange(x: jax.Array, axis: int) -> jax.Array:
        missing = -x.shape[axis] % mesh.size
        padded = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return lax.all_to_all(padded, mesh.axis_names, split_axis=axis, concat_axis=0, tiled=True)

    def share(x: jax.Array | LowRank) -> jax.Array | LowRank:
        if not isinstance(x, LowRank):
            return exchange(x.reshape(x.shape[0], -1), 1)
        x = x.checked()
        return LowRank.of((exchange(x.left, 2), lax.all_gather(x.right, mesh.axis_names, tiled=True)))

    return jax.tree.map(share, updates, is_leaf=is_low_rank)


def own_columns(rows: PyTree, updates: PyTree, mesh: Mesh) -> PyTree:
    """Inside `all_reduced`: of rows that every device has, the share of the parameters that it works on.

    Args:
      rows: leaves `[K, ...]`, arrays.
      updates: the clients' updates, of which `share_of_parameters` gives the same parameters.
      mesh: as in `divides`.

    Returns:
      Leaves `[K, D / n]`, filled up with zeros as by `share_of_parameters`.
    """

    def own(x: jax.Array, of_clients: jax.Array | LowRank) -> jax.Array:
        # A matrix that is known by its factors is shared out row by row.
        units = x.reshape(x.shape[0], -1, x.shape[-1] if isinstance(of_clients, LowRank) else 1)
        padded = jnp.pad(units, ((0, 0), (0, -units.shape[1] % mesh.size), (0, 0)))
        width = padded.shape[1] // mesh.size
        share = lax.dynamic_slice_in_dim(padded, lax.axis_index(mesh.axis_names) * width, width, axis=1)
        return share.reshape(x.shape[0], -1)

    return jax.tree.map(own, rows, updates)
