"""Programs over seeds: seeds share out the devices, and on a CPU each device runs its seeds one after another."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from cedarjax.core.chunks import ChunkSize


def side_by_side() -> ChunkSize:
    """Clients or seeds that a device runs at once: one on a CPU, so that weights stay in cache; else all that fit."""
    return 1 if jax.default_backend() == "cpu" else "auto"


class OverSeeds:
    """A function of one seed, compiled for all of them.

    Arguments are placed on all devices and results are left there, so that what one call returns the next one takes
    without another compilation.

    Args:
      fun: `fun(one, shared)`, with `one` the arguments of one seed.
      num_seeds: seeds, the leading axis of `args` when the program is called.
    """

    def __init__(self, fun: Callable[[Any, Any], Any], num_seeds: int):
        """Composes the program; nothing is compiled yet."""
        devices = jax.devices()[:num_seeds]
        mesh = jax.make_mesh((len(devices),), ("seeds",), axis_types=(AxisType.Auto,), devices=devices)
        map_fn = cj.cohort_map(side_by_side(), mesh if len(devices) > 1 else None)
        self._everywhere = NamedSharding(mesh, P())
        self._program = jax.jit(
            lambda args, shared: map_fn(lambda shared, one: fun(one, shared), shared, args),
            out_shardings=self._everywhere,
        )
        self._compiled: Callable[[Any, Any], Any] | None = None

    def compile(self, args: Any, shared: Any = ()) -> None:
        """Compiles without running, for example in another thread; the next calls wait for nothing.

        Args:
          args: as in a call.
          shared: as in a call.
        """
        if self._compiled is None:
            self._compiled = self._program.lower(*self._place(args, shared)).compile()

    def __call__(self, args: Any, shared: Any = ()) -> Any:
        """Results of all seeds, stacked.

        Args:
          args: tree with the seeds on axis 0.
          shared: tree that all seeds see.

        Returns:
          Tree with the seeds on axis 0.
        """
        self.compile(args, shared)
        assert self._compiled is not None
        return self._compiled(*self._place(args, shared))

    def _place(self, args: Any, shared: Any) -> Any:
        return jax.device_put((args, shared), self._everywhere)
