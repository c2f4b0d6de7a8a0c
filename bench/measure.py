"""How anything is measured: compiled apart, warmed up, then timed in turns.

Every program has its place in each turn, so that whatever else the machine does falls on all of them alike: one call
that brings the caches and the allocator back to where a training loop has them, unless it takes so long that they do
not matter, then the timed one. The processor time of the process stands beside the wall clock: where the two differ,
something waited, or more than one core worked.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from bench import machine
from bench.floor import Ceilings, Work

Tell = Callable[[str], None]
Sample = TypeVar("Sample")
LONG_SECONDS = 1.0  # a call that takes longer needs no call before it
LEAST_SAMPLES = 2  # of a program that takes longer than it is given
MEMORY_SHARE = 0.8  # of what is free: a CPU's process that takes more is killed, without an exception


class Case(NamedTuple):
    """One program to time."""

    layout: str
    """How the clients lie on the hardware, for example `"chunks of 4"`."""
    part: str
    """What of the workload it does, for example `"round"`."""
    fun: Callable[..., Any]
    """Pure function of arrays, not jitted."""
    args: tuple[Any, ...]
    """Its arguments, on their devices; never donated."""
    units: int
    """Units of work in one call, for example clients."""
    work: Work | None = None
    """The least that one call has to do; None where it is not counted."""
    num_devices: int = 1
    """Devices that it runs on."""


class PeerTask(NamedTuple):
    """A workload as others know it."""

    task: Callable[[int], Any]
    """`task(num_clients) -> bench.peers.Task`."""
    answer: Callable[[int, Any], dict[str, np.ndarray]]
    """`answer(num_clients, output)`: what a peer should find, read from the output of a `Case`."""


class Duel(NamedTuple):
    """One thing among many that a workload measures, each of which others do in their own way."""

    name: str
    """Of the thing, for example of a rule."""
    num_clients: int
    """Clients that take part."""
    num_params: int
    """Numbers in one client's update."""
    cases: Sequence[Case]
    """Ours, in every layout."""
    tasks: dict[str, tuple[str, Callable[[], Any]]]
    """Names for the table, each with one of `bench.peers.PEERS` and what makes its task; empty if nobody does it."""
    answer: Callable[[Any], dict[str, np.ndarray]]
    """`answer(output)`: what a peer should find, read from the output of a `Case`."""
    is_compared: bool = True
    """Whether peers do exactly the same, so that results have to agree."""


class Workload(NamedTuple):
    """What one file of `bench.workloads` offers."""

    title: str
    """One line on what is measured."""
    unit: str
    """What `Case.units` counts, for example `"client"`."""
    num_clients: tuple[int, ...]
    """Sizes of the cohort, unless they are asked for."""
    layouts: Callable[[int, Any], Sequence[Case]]
    """`layouts(num_clients, dtype)`: everything that is done, each in every layout."""
    parts: Callable[[int, Any, str], Sequence[Case]] | None = None
    """`parts(num_clients, dtype, layout)`: the same broken down, in the layout that was fastest."""
    goal_ms: float | None = None
    """Milliseconds a unit that the fastest layout is to stay below."""
    peers: PeerTask | None = None
    """How others do it, if they can."""
    most_seconds: float = float("inf")
    """As in `take_turns`, for every program and every peer."""
    duels: Callable[[int, Any], Sequence[Duel]] | None = None
    """`duels(num_clients, dtype)`: the same things as `layouts`, where each has its own peers."""
    configure: Callable[..., "Workload"] | None = None
    """`configure(num_params=, names=, is_weighted=)`: the same for other updates; None where there is no choice."""
    baseline: str | None = None
    """Part that all others are told as multiples of, in the same layout; None where they are not."""


class Measurement(NamedTuple):
    """What came out for one case."""

    layout: str
    """As in `Case`."""
    part: str
    """As in `Case`."""
    units: int
    """As in `Case`."""
    num_devices: int
    """As in `Case`."""
    seconds: list[float]
    """Wall clock of every timed call; empty if the program was not run."""
    cpu_seconds: list[float]
    """Processor time of the process during every timed call, all threads together."""
    compile_seconds: float
    """Tracing, lowering and compiling."""
    peak_bytes: int | None
    """Arguments, results and temporaries of the compiled program on one device; None where the backend does not say."""
    temp_bytes: int | None
    """Temporaries alone."""
    floor_seconds: float | None = None
    """Time that one call takes at the least; None where its work is not counted."""
    skipped: str | None = None
    """Why the program was not run."""
    argument_bytes: int | None = None
    """Arguments alone, on one device."""

    @property
    def median_seconds(self) -> float:
        """Median wall clock of one call; infinite if there was none."""
        return statistics.median(self.seconds) if self.seconds else float("inf")

    @property
    def ms(self) -> float:
        """Median wall clock of one unit in milliseconds."""
        return 1e3 * self.median_seconds / self.units

    @property
    def cpu_ms(self) -> float:
        """Median processor time of one unit in milliseconds."""
        return 1e3 * statistics.median(self.cpu_seconds) / self.units if self.cpu_seconds else float("inf")

    @property
    def ratio(self) -> float | None:
        """Median wall clock over the floor."""
        return None if self.floor_seconds is None else self.median_seconds / self.floor_seconds

    @property
    def temp_share(self) -> float | None:
        """Temporaries over arguments: 1 or more where all data are copied."""
        return self.temp_bytes / self.argument_bytes if self.argument_bytes and self.temp_bytes is not None else None

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        derived = {"ms": self.ms, "cpu_ms": self.cpu_ms, "ratio": self.ratio, "temp_share": self.temp_share}
        return {**self._asdict(), **derived}


class Program(NamedTuple):
    """A case that is compiled, or the reason why it is not."""

    case: Case
    """What it is."""
    compiled: jax.stages.Compiled | None
    """None if there is not enough memory to compile it."""
    compile_seconds: float
    """As in `Measurement`."""
    skipped: str | None
    """As in `Measurement`."""

    def output(self) -> Any:
        """Results of one call, complete."""
        assert self.compiled is not None
        return jax.block_until_ready(self.compiled(*self.case.args))

    def time(self) -> tuple[float, float]:
        """Wall clock and processor time of one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.output()
        return time.perf_counter() - wall, time.process_time() - cpu

    def measurement(self, samples: Sequence[tuple[float, float]], ceilings: Ceilings | None) -> Measurement:
        """What the samples say, beside what is known of the program."""
        case = self.case
        peak, temp, arguments = _memory(self.compiled)
        return Measurement(
            layout=case.layout,
            part=case.part,
            units=case.units,
            num_devices=case.num_devices,
            seconds=[wall for wall, _ in samples],
            cpu_seconds=[cpu for _, cpu in samples],
            compile_seconds=self.compile_seconds,
            peak_bytes=peak,
            temp_bytes=temp,
            floor_seconds=_floor(case, ceilings),
            skipped=self.skipped,
            argument_bytes=arguments,
        )


def build(case: Case) -> Program:
    """Compiles a case ahead of time, and says so if the machine has not the memory to run it."""
    start = time.perf_counter()
    try:
        compiled = jax.jit(case.fun).lower(*case.args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(case, None, time.perf_counter() - start, "out of memory")
    seconds = time.perf_counter() - start
    available = machine.available_bytes()
    peak = _memory(compiled)[0]
    shared = case.num_devices if jax.default_backend() == "cpu" else 1  # devices that share one memory
    args = sum(leaf.nbytes for leaf in jax.tree.leaves(case.args) if isinstance(leaf, jax.Array))
    needed = 0 if peak is None else max(0, peak * shared - args)  # the arguments are there already
    if available is not None and needed > MEMORY_SHARE * available:
        return Program(case, compiled, seconds, f"needs {needed / 2**30:.1f} GiB of {available / 2**30:.1f}")
    return Program(case, compiled, seconds, None)


def take_turns(
    calls: Sequence[Callable[[], Sample]],
    *,
    repeats: int,
    most_seconds: float = float("inf"),
    tell: Tell = lambda text: None,
) -> list[list[Sample]]:
    """Calls everything in each turn, short calls twice, and keeps what the last call returns.

    A first turn is not counted.

    Args:
      calls: what takes turns; each returns its own sample.
      repeats: turns that count, at least 5.
      most_seconds: what has taken longer, all its calls together, sits out once it has `LEAST_SAMPLES` samples.
      tell: called with a line on what is going on.

    Returns:
      The samples of each call, `repeats` of them, or fewer of what sat out.

    Raises:
      ValueError: if there are too few repeats.
    """
    if repeats < 5:
        raise ValueError(f"repeats must be at least 5, got {repeats}.")
    samples: list[list[Sample]] = [[] for _ in calls]
    is_long = [False for _ in calls]
    seconds = [0.0 for _ in calls]
    for turn in range(repeats + 1):
        tell(f"turn {turn} of {repeats}" if turn else "warming up")
        for index, call in enumerate(calls):
            if len(samples[index]) >= LEAST_SAMPLES and seconds[index] > most_seconds:
                continue
            began = time.perf_counter()
            if not is_long[index]:
                call()
                is_long[index] = time.perf_counter() - began > LONG_SECONDS
            if turn or not is_long[index]:  # a long call is warmed up after one
                start = time.perf_counter()
                sample = call()
                is_long[index] = time.perf_counter() - start > LONG_SECONDS
            seconds[index] += time.perf_counter() - began
            if turn:
                samples[index].append(sample)
    return samples


def measure(
    cases: Iterable[Case],
    *,
    repeats: int,
    most_seconds: float = float("inf"),
    ceilings: Ceilings | None = None,
    tell: Tell = lambda text: None,
) -> list[Measurement]:
    """Compiles every case, then times them in turns.

    Args:
      cases: what to time.
      repeats: timed calls of each case, at least 5.
      most_seconds: as in `take_turns`.
      ceilings: what the hardware can do; None for no floors.
      tell: called with a line on what is going on.

    Returns:
      One `Measurement` a case, in order.

    Raises:
      ValueError: if there are too few repeats.
    """
    programs = []
    for case in cases:
        tell(f"compiling {case.part}, {case.layout}")
        programs.append(build(case))
    runs = [program for program in programs if program.skipped is None]
    timed = take_turns([program.time for program in runs], repeats=repeats, most_seconds=most_seconds, tell=tell)
    samples = iter(timed)
    return [program.measurement([] if program.skipped else next(samples), ceilings) for program in programs]


def fastest(measurements: Iterable[Measurement]) -> list[Measurement]:
    """The fastest on one device and the fastest on several, the faster one first."""
    best: dict[int, Measurement] = {}
    for measurement in sorted(measurements, key=lambda measurement: measurement.ms):
        best.setdefault(measurement.num_devices, measurement)
    return list(best.values())


def _floor(case: Case, ceilings: Ceilings | None) -> float | None:
    if case.work is None or ceilings is None:
        return None
    # The ceilings are those of all cores of a CPU, but of one accelerator.
    return ceilings.seconds(case.work) / (1 if jax.default_backend() == "cpu" else case.num_devices)


def _memory(compiled: jax.stages.Compiled | None) -> tuple[int | None, int | None, int | None]:
    """Peak, temporaries and arguments in bytes."""
    memory = None if compiled is None else compiled.memory_analysis()
    if memory is None:
        return None, None, None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes, memory.temp_size_in_bytes, memory.argument_size_in_bytes
