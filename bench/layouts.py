"""How the clients of a workload lie on the hardware."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj

CHUNK_SIZES: tuple[cj.core.ChunkSize, ...] = (1, 10, 100, None, "auto")
LOW_RANK_CHUNK_SIZES: tuple[cj.core.ChunkSize, ...] = (10, 100, "auto")  # factors are for clients side by side
REPRESENTATIONS: tuple[cj.core.Representation, ...] = ("dense", "auto")


class Layout(NamedTuple):
    """How the clients lie on the hardware."""

    chunk_size: cj.core.ChunkSize
    """As in `cohort_map`."""
    mesh: Mesh | None = None
    """As in `cohort_map`."""
    streamed: bool = False
    """Averaged while it maps, by `streamed_round`."""
    representation: cj.core.Representation = "dense"
    """Form of the clients' weights."""

    @property
    def name(self) -> str:
        """For the tables."""
        chunk = {None: "vmap", 1: "loop", "auto": "auto chunks"}.get(self.chunk_size, f"chunks of {self.chunk_size}")
        mesh = [] if self.mesh is None else [self.where]
        form = [] if self.representation == "dense" else ["low rank"]
        return ", ".join([*mesh, *(["streamed"] if self.streamed else []), *form, chunk])

    @property
    def where(self) -> str:
        """Name of the devices alone."""
        return "one device" if self.mesh is None else f"mesh of {self.mesh.size}"

    @property
    def num_devices(self) -> int:
        """Devices that take part."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def map_fn(self) -> cj.core.MapFn:
        """The layout as `cohort_map` knows it."""
        return cj.cohort_map(self.chunk_size, self.mesh)

    def mean_round(self, local: cj.LocalUpdate) -> cj.FederatedAlgorithm:
        """A round that takes the mean and steps with it as it is, streamed or not."""
        if self.streamed:
            return cj.streamed_round(local, optax.sgd(1.0), chunk_size=self.chunk_size or 1, mesh=self.mesh)
        return cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)), self.map_fn)

    def place(self, tree: Any, num_clients: int | None = None) -> Any:
        """Puts arrays where the round leaves them: a client axis over the mesh, if it divides, all else everywhere."""
        if self.mesh is None:
            return tree
        divides = num_clients is not None and num_clients % self.mesh.size == 0
        return jax.device_put(tree, NamedSharding(self.mesh, P("clients") if divides else P()))


def meshes() -> list[Mesh | None]:
    """One device; and all of them, if there are several."""
    count = len(jax.devices())
    return [None] + ([jax.make_mesh((count,), ("clients",), axis_types=(AxisType.Auto,))] if count > 1 else [])


def layouts(
    num_clients: int,
    *,
    chunk_sizes: tuple[cj.core.ChunkSize, ...] = CHUNK_SIZES,
    streamed: tuple[bool, ...] = (False, True),
    representations: tuple[cj.core.Representation, ...] = REPRESENTATIONS,
) -> list[Layout]:
    """All layouts of a linear rule, save the chunks that hold all clients of a device.

    Args:
      num_clients: clients in the cohort.
      chunk_sizes: as in `cohort_map`; None is not streamed.
      streamed: collected, streamed, or both.
      representations: forms of the clients' weights.

    Returns:
      At least one layout a mesh and form.
    """
    found = []
    for mesh in meshes():
        most = -(-num_clients // (1 if mesh is None else mesh.size))
        for form in representations:
            offered = [size for size in chunk_sizes if form == "dense" or size in LOW_RANK_CHUNK_SIZES]
            chunks = [size for size in offered if size == "auto" or (size is not None and size < most)]
            collected = [*chunks, None] if None in offered or not chunks else chunks
            found += [
                Layout(size, mesh, streams, form)
                for streams in streamed
                for size in ((chunks or [most]) if streams else collected)
            ]
    return found
