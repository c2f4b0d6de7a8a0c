"""Many small things, each beside its own peers: for every one of them our layouts and the peers take turns."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bench.floor import Ceilings
from bench.measure import Duel, Tell, Workload, build
from bench.versus import Arrays, Versus, difference, take_turns_with_peers


class DuelResult(NamedTuple):
    """What came out of one duel."""

    name: str
    """As in `Duel`."""
    num_clients: int
    """As in `Duel`."""
    num_params: int
    """As in `Duel`."""
    is_compared: bool
    """As in `Duel`."""
    versus: Versus
    """Everybody's times."""

    @property
    def ratio(self) -> float | None:
        """Time of the fastest peer over that of our fastest layout; None where one of them is missing."""
        theirs = [peer.ms for peer in self.versus.peers if peer.seconds]
        ours = self.versus.best
        return min(theirs) / ours.ms if theirs and ours.seconds else None

    @property
    def agrees(self) -> bool:
        """False if a peer ran and found something else."""
        return all(peer.agrees for peer in self.versus.peers)

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        fields = {name: value for name, value in self._asdict().items() if name != "versus"}
        best = self.versus.best
        return {**fields, "ms": best.ms, "layout": best.layout, "ratio": self.ratio, **self.versus.record()}


def geometric_mean(results: Sequence[DuelResult]) -> float | None:
    """Of all ratios that there are; None if there are none."""
    ratios = [result.ratio for result in results if result.ratio is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def fight(
    workload: Workload,
    num_clients: int,
    *,
    repeats: int,
    ceilings: Ceilings | None = None,
    tell: Tell = lambda text: None,
) -> list[DuelResult]:
    """Runs all duels of a workload, one after the other.

    Args:
      workload: one that has duels.
      num_clients: clients in the cohort.
      repeats: timed calls of each program and peer, at least 5, fewer of those that reach the workload's
        `most_seconds`.
      ceilings: what the hardware can do; None for no floors.
      tell: called with a line on what is going on.

    Returns:
      One result a duel, in order.
    """
    assert workload.duels is not None
    duels = workload.duels(num_clients, jnp.float32)
    return [_one(duel, workload.most_seconds, repeats, ceilings, tell) for duel in duels]


def _one(duel: Duel, most_seconds: float, repeats: int, ceilings: Ceilings | None, tell: Tell) -> DuelResult:
    tell(f"compiling {duel.name}")
    programs = [build(case) for case in duel.cases]
    answers = [duel.answer(program.output()) for program in programs if program.skipped is None and duel.tasks]

    def difference_fn(theirs: Arrays) -> float | None:
        """The largest of those to our layouts, each over the largest number of the peer's result."""
        if not duel.is_compared:
            return None
        zeros = {name: np.zeros_like(leaf) for name, leaf in theirs.items()}
        return max((difference(theirs, ours, zeros) for ours in answers), default=None)

    versus = take_turns_with_peers(
        programs,
        duel.tasks,
        difference_fn,
        repeats=repeats,
        most_seconds=most_seconds,
        ceilings=ceilings,
        tell=lambda text: tell(f"{duel.name}: {text}"),
    )
    return DuelResult(duel.name, duel.num_clients, duel.num_params, duel.is_compared, versus)
