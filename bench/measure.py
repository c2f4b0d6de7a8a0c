"""How anything is measured: compiled apart, warmed up, then timed in turns.

Every case has its place in each turn, so that whatever else the machine does falls on all of them alike: one call that
brings the caches and the allocator back to where a training loop has them, then the timed one. The processor time of
the process stands beside the wall clock: where the two differ, something waited, or more than one core worked.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """One program to time."""

    layout: str
    """How the clients lie on the hardware, for example `"chunk 4"`."""
    part: str
    """What of the workload it does, for example `"round"`."""
    fun: Callable[..., Any]
    """Pure function of arrays, not jitted."""
    args: tuple[Any, ...]
    """Its arguments, on their devices; never donated."""
    units: int
    """Units of work in one call, for example clients."""


class Workload(NamedTuple):
    """What one file of `bench.workloads` offers."""

    title: str
    """One line on what is measured."""
    unit: str
    """What `Case.units` counts, for example `"client"`."""
    num_clients: tuple[int, ...]
    """Sizes of the cohort, unless they are asked for."""
    layouts: Callable[[int], Sequence[Case]]
    """`layouts(num_clients)`: the whole workload in every layout."""
    parts: Callable[[int, str], Sequence[Case]]
    """`parts(num_clients, layout)`: the same broken down, in the layout that was fastest."""
    goal_ms: float | None = None
    """Milliseconds a unit that the fastest layout is to stay below."""


class Measurement(NamedTuple):
    """What came out for one case."""

    layout: str
    """As in `Case`."""
    part: str
    """As in `Case`."""
    units: int
    """As in `Case`."""
    seconds: list[float]
    """Wall clock of every timed call."""
    cpu_seconds: list[float]
    """Processor time of the process during every timed call, all threads together."""
    compile_seconds: float
    """Tracing, lowering and compiling."""
    peak_bytes: int | None
    """Arguments, results and temporaries of the compiled program on one device; None where the backend does not say."""

    @property
    def ms(self) -> float:
        """Median wall clock of one unit in milliseconds."""
        return 1e3 * statistics.median(self.seconds) / self.units

    @property
    def cpu_ms(self) -> float:
        """Median processor time of one unit in milliseconds."""
        return 1e3 * statistics.median(self.cpu_seconds) / self.units

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self._asdict(), "ms": self.ms, "cpu_ms": self.cpu_ms}


class _Program(NamedTuple):
    compiled: jax.stages.Compiled
    compile_seconds: float


def measure(
    cases: Iterable[Case], *, repeats: int, tell: Callable[[str], None] = lambda text: None
) -> list[Measurement]:
    """Compiles every case, then times them in turns.

    Args:
      cases: what to time.
      repeats: timed calls of each case, at least 5.
      tell: called with a line on what is going on.

    Returns:
      One `Measurement` a case, in order.

    Raises:
      ValueError: if there are too few repeats.
    """
    if repeats < 5:
        raise ValueError(f"repeats must be at least 5, got {repeats}.")
    cases = list(cases)
    programs = []
    for case in cases:
        tell(f"compiling {case.part}, {case.layout}")
        programs.append(_compile(case))
    samples: list[list[tuple[float, float]]] = [[] for _ in cases]
    for turn in range(repeats + 1):  # the first is not counted
        tell(f"turn {turn} of {repeats}" if turn else "warming up")
        for case, program, taken in zip(cases, programs, samples, strict=True):
            jax.block_until_ready(program.compiled(*case.args))
            sample = _time(program.compiled, case.args)
            if turn:
                taken.append(sample)
    return [
        Measurement(
            layout=case.layout,
            part=case.part,
            units=case.units,
            seconds=[wall for wall, _ in taken],
            cpu_seconds=[cpu for _, cpu in taken],
            compile_seconds=program.compile_seconds,
            peak_bytes=_peak_bytes(program.compiled),
        )
        for case, program, taken in zip(cases, programs, samples, strict=True)
    ]


def _compile(case: Case) -> _Program:
    start = time.perf_counter()
    compiled = jax.jit(case.fun).lower(*case.args).compile()
    return _Program(compiled, time.perf_counter() - start)


def _time(compiled: jax.stages.Compiled, args: tuple[Any, ...]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes
