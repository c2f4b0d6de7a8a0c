"""The fastest layouts and those who do the same with other libraries, in turns; and whether the results agree."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bench.floor import Ceilings
from bench.measure import Measurement, Program, Tell, Workload, build, take_turns

Arrays = dict[str, np.ndarray]

TOLERANCE = 1e-3


class PeerResult(NamedTuple):
    """What came out for one peer."""

    peer: str
    """Its name."""
    units: int
    """Units of work in one call, as in `Case`."""
    seconds: list[float]
    """Wall clock of every timed call, as the peer measures it; empty if it could not run."""
    compile_seconds: float | None = None
    """What came before the first call."""
    peak_bytes: int | None = None
    """The most memory that its process held."""
    versions: dict[str, str] | None = None
    """Of the libraries that it is made of."""
    difference: float | None = None
    """Largest difference to our result over the largest change that the round makes, or over the largest number of
    the peer's result."""
    unavailable: str | None = None
    """Why it could not run."""

    @property
    def ms(self) -> float:
        """Median wall clock of one unit in milliseconds."""
        return 1e3 * statistics.median(self.seconds) / self.units if self.seconds else float("inf")

    @property
    def agrees(self) -> bool:
        """False if it ran and found something else."""
        return self.difference is None or self.difference <= TOLERANCE

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self._asdict(), "ms": self.ms, "agrees": self.agrees}


class Versus(NamedTuple):
    """One workload, or one of its duels, measured beside its peers."""

    ours: list[Measurement]
    """The fastest on one device and on several, timed in the same turns."""
    peers: list[PeerResult]
    """All peers that know the workload."""

    @property
    def best(self) -> Measurement:
        """Our fastest."""
        return min(self.ours, key=lambda measurement: measurement.ms)

    def ratio(self, peer: PeerResult) -> float:
        """Time of a peer over ours."""
        return peer.ms / self.best.ms

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "ours": [measurement.record() for measurement in self.ours],
            "peers": [{**peer.record(), "ratio": self.ratio(peer)} for peer in self.peers],
        }


def difference(ours: Arrays, theirs: Arrays, start: Arrays) -> float:
    """Largest difference between two results over the largest change from a start, `|a - b| / |a - start|`.

    Args:
      ours: arrays by name.
      theirs: arrays of the same names and shapes.
      start: arrays of the same names; zeros for a gradient.

    Returns:
      A ratio; infinite if names or shapes disagree or a number is not finite.
    """
    if ours.keys() != theirs.keys() or any(ours[name].shape != np.shape(theirs[name]) for name in ours):
        return float("inf")

    def largest(a: Arrays, b: Arrays) -> float:
        return float(max(np.abs(np.float64(a[name]) - np.float64(b[name])).max() for name in a))

    ratio = largest(ours, theirs) / max(largest(ours, start), np.finfo(np.float64).tiny)
    return ratio if math.isfinite(ratio) else float("inf")


class _Peer:
    """A peer that is running; once it fails it stays silent, and the others go on."""

    def __init__(self, name: str, running: Any):
        self.name, self.running = name, running
        self.failure: str | None = None

    def run(self) -> float:
        from bench import peers

        if self.failure is None:
            try:
                return float(self.running.run())
            except peers.PeerUnavailable as error:
                self.failure = str(error)
        return float("nan")


def compare(
    workload: Workload,
    num_clients: int,
    names: Iterable[str],
    *,
    repeats: int,
    ceilings: Ceilings | None = None,
    tell: Tell = lambda text: None,
) -> Versus:
    """Runs our layouts of these names and all peers of the workload in turns, and compares the results.

    Args:
      workload: one that has peers.
      num_clients: clients in the cohort.
      names: layouts that stand for us.
      repeats: timed calls of each, at least 5.
      ceilings: what the hardware can do; None for no floors.
      tell: called with a line on what is going on.

    Returns:
      A `Versus`; a peer that cannot run is part of it, with the reason.
    """
    from bench import peers

    assert workload.peers is not None
    cases = {case.layout: case for case in workload.layouts(num_clients, jnp.float32)}
    programs = [build(cases[name]) for name in names]
    task = workload.peers.task(num_clients)
    ours = workload.peers.answer(num_clients, programs[0].output())
    start = task.params if task.kind == "fedavg" else {name: np.zeros_like(leaf) for name, leaf in ours.items()}
    known = [name for name in peers.PEERS if peers.supports(name, task.kind, task.model)]
    return take_turns_with_peers(
        programs,
        {name: (name, lambda: task) for name in known},
        lambda theirs: difference(ours, theirs, start),
        repeats=repeats,
        most_seconds=workload.most_seconds,
        ceilings=ceilings,
        tell=tell,
    )


def take_turns_with_peers(
    programs: Sequence[Program],
    tasks: Mapping[str, tuple[str, Callable[[], Any]]],
    difference_fn: Callable[[Arrays], float | None],
    *,
    repeats: int,
    most_seconds: float = float("inf"),
    ceilings: Ceilings | None = None,
    tell: Tell = lambda text: None,
) -> Versus:
    """Times programs and peers in turns.

    Args:
      programs: ours, compiled; one that does not fit into memory is not run.
      tasks: names for the table, each with a peer and what makes its task.
      difference_fn: says how far a peer's result is from ours; None where that means nothing.
      repeats: timed calls of each, at least 5.
      most_seconds: as in `take_turns`.
      ceilings: what the hardware can do; None for no floors.
      tell: called with a line on what is going on.

    Returns:
      A `Versus`; a peer that cannot run is part of it, with the reason.
    """
    from bench import peers

    units = programs[0].case.units
    runs = [program for program in programs if program.skipped is None]
    found: dict[str, PeerResult] = {}
    with contextlib.ExitStack() as stack:
        started: list[_Peer] = []
        for name, (peer, make_task) in tasks.items():
            tell(f"starting {name}")
            try:
                started.append(_Peer(name, stack.enter_context(peers.start(peer, make_task(), tell=tell))))
            except peers.PeerUnavailable as error:
                found[name] = PeerResult(name, units, [], unavailable=str(error))
        calls: Sequence[Callable[[], Any]] = [*(program.time for program in runs), *(p.run for p in started)]
        samples = take_turns(calls, repeats=repeats, most_seconds=most_seconds, tell=tell)
        for running, seconds in zip(started, samples[len(runs) :], strict=True):
            found[running.name] = _result(running, seconds, units, difference_fn)
    taken = iter(samples[: len(runs)])
    ours = [program.measurement([] if program.skipped else next(taken), ceilings) for program in programs]
    return Versus(ours, [found[name] for name in tasks])


def _result(
    peer: _Peer, seconds: list[float], units: int, difference_fn: Callable[[Arrays], float | None]
) -> PeerResult:
    from bench import peers

    running, failure = peer.running, peer.failure
    if failure is None:
        try:
            apart, peak = difference_fn(running.result()), running.peak_bytes()
            return PeerResult(
                peer.name, units, seconds, running.compile_seconds, peak, dict(running.versions), difference=apart
            )
        except peers.PeerUnavailable as error:
            failure = str(error)
    return PeerResult(peer.name, units, [], unavailable=failure)
