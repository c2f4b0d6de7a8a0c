"""One thread or all cores: what a peer computes faster with."""

import os
import time
from collections.abc import Callable

from bench.peers.task import Program

NUM_TRIALS, TRIAL_SECONDS = 3, 5.0
LONG_SECONDS = 1.0  # a call that takes longer wakes its threads itself


def choose_threads(trial: Program, set_threads: Callable[[int], None]) -> int:
    """Times a task, or a small part of it, with one thread and with as many as there are cores.

    Args:
      trial: the task or the part.
      set_threads: tells the peer's libraries how many threads to use.

    Returns:
      The number that was faster; it is set.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seconds = dict.fromkeys((1, cores), float("inf"))
    began = time.perf_counter()
    for turn in range(NUM_TRIALS):
        if turn and time.perf_counter() - began > TRIAL_SECONDS:
            break
        for threads in seconds:
            set_threads(threads)
            latest = _seconds(trial)  # wakes them
            if latest <= LONG_SECONDS:
                latest = _seconds(trial)
            seconds[threads] = min(seconds[threads], latest)
    threads = min(seconds, key=seconds.__getitem__)
    set_threads(threads)
    return threads


def _seconds(trial: Program) -> float:
    trial.refresh()
    start = time.perf_counter()
    trial.run()
    return time.perf_counter() - start
