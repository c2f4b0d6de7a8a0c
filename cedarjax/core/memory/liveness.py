"""Which values of a program are held in memory, from when to when, and how much that is at the worst moment.

The rules are those by which XLA:CPU fuses, orders and places, cut down to what decides the peak.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable

from cedarjax.core.memory.program import Loop, Operation, Program, Value


@dataclasses.dataclass(eq=False)
class Step:
    """Operations that run as one: the last of them, and what is computed within it."""

    last: Operation
    """The operation whose results are written."""
    reads: dict[Value, bool]
    """Values that are read from memory; and whether the result may be written over them."""


def program_bytes(program: Program) -> int:
    """Most bytes that are held at once, besides the inputs and the room of the outputs."""
    outputs = {value for value in program.outputs if value is not None and value.source is not None}
    return max(0, _Schedule(program, None).peak() - sum(value.num_bytes for value in outputs))


def _inner_bytes(operation: Operation) -> int:
    """Most bytes that an operation holds besides its operands and results."""
    if operation.loop is not None:
        return _Schedule(operation.loop.body, operation.loop).peak()
    return max(map(program_bytes, operation.branches), default=operation.scratch)


class _Schedule:
    """Steps, their order, and who holds what when."""

    def __init__(self, program: Program, loop: Loop | None):
        self.views: dict[Value, Value] = {}
        operations = self._without_views(program.needed())
        outputs = [None if value is None else self._held(value) for value in program.outputs]
        first, count = (0, 0) if loop is None else (loop.num_consts, loop.num_carry)
        self.carry = dict(zip(program.inputs[first : first + count], outputs[:count], strict=True))
        self.kept = {value for value in outputs if value is not None}
        self.stacked = set() if loop is None else self.kept.difference(outputs[:count])
        self.stored: set[Value] = set()
        self.within: dict[Value, set[Operation]] = {}
        self.steps = self._fuse(operations)
        self.place: dict[Value, Value | None] = {}
        self._copy_carry()
        self._order_by_breadth()

    def _held(self, value: Value) -> Value:
        """The value in whose memory it lies."""
        while value in self.views:
            value = self.views[value]
        return value

    def _without_views(self, operations: list[Operation]) -> list[Operation]:
        """Leaves out what only looks at stored numbers in another shape: reshapes, and transposes beside a product."""
        readers = _readers(operations, lambda value: value)
        for operation in operations:
            if operation.name not in ("reshape", "transpose") or not operation.inputs:
                continue
            held, (result,) = self._held(operation.inputs[0]), operation.results
            if held.source is None or not held.source.fuses:
                into_products = readers[result] and all(reader.name == "dot_general" for reader in readers[result])
                of_product = held.source is not None and held.source.name == "dot_general"
                if operation.name == "reshape" or of_product or into_products:
                    self.views[result] = held
        return [operation for operation in operations if operation.results[0] not in self.views]

    def _fuse(self, operations: list[Operation]) -> list[Step]:
        """Decides, from the end to the start, what is stored and what its readers compute for themselves."""
        readers = _readers(operations, self._held)
        outputs = self.kept - self.stacked
        times: dict[Value, int] = {}  # how often it is computed if it is not stored
        for operation in reversed(operations):
            for value in operation.results:
                by = [reader.results[0] for reader in readers[value]]
                times[value] = sum(1 if x in self.stored else times[x] for x in by) + (value in self.stacked)
                fusing = {reader for reader in readers[value] if reader.fuses and (len(by) == 1 or not reader.sums)}
                by_itself = not operation.fuses or len(fusing) < len(by) or value in outputs
                again = times[value] > 1 or any(reader.spreads for reader in fusing)
                if by_itself or (operation.costly and again):
                    self.stored.add(value)
                if operation.fuses and (value not in self.stored or (operation.narrow and not operation.costly)):
                    self.within[value] = fusing
        written = self.stored | self.stacked
        steps = []
        for operation in operations:
            if written.isdisjoint(operation.results):
                continue
            step, result = Step(operation, self._reads(operation)), operation.results[0]
            sources = [self._held(value) for value in operation.inputs]
            if operation.name == "reshape" and sources and list(step.reads) == sources and result not in self.kept:
                self.views[result] = sources[0]
            else:
                steps.append(step)
        return steps

    def _reads(self, operation: Operation) -> dict[Value, bool]:
        """Stored values that an operation rests on, through what is computed within it."""
        found: dict[Value, list[bool]] = collections.defaultdict(list)
        seen = set()
        pending = [(value, operation, operation.overwrites(index)) for index, value in enumerate(operation.inputs)]
        while pending:
            value, reader, over = pending.pop()
            value = self._held(value)
            if (value, reader, over) in seen:
                continue
            seen.add((value, reader, over))
            source = value.source
            if source is not None and reader in self.within.get(value, ()):
                pending += [(x, source, over and source.overwrites(index)) for index, x in enumerate(source.inputs)]
            else:
                found[value].append(over)
        suffices = any if operation.updates else all
        return {value: suffices(ways) for value, ways in found.items()}

    def _copy_carry(self) -> None:
        """Gives each new carry the place of the old one, which is copied first if others may read it later."""
        number = {value: index for index, step in enumerate(self.steps) for value in step.last.results}
        before: list[int] = []  # bit sets of the steps that a step waits for
        for step in self.steps:
            earlier = [number[value] for value in step.reads if value in number]
            before.append(functools.reduce(operator.or_, [before[index] | 1 << index for index in earlier], 0))
        for old, new in self.carry.items():
            if new is None or new is old:
                continue
            readers = [index for index, step in enumerate(self.steps) if old in step.reads]
            last = number.get(new)
            waits = last is not None and all(index == last or before[last] >> index & 1 for index in readers)
            if not readers or (waits and new not in self.place):
                self.place.setdefault(new, old)
                continue
            self.place.setdefault(new, None)
            copied = Value(old.shape, old.num_bytes)
            copied.source = Operation("copy", [old], [copied])
            self.stored.add(copied)
            for index in readers:
                self.steps[index].reads[copied] = self.steps[index].reads.pop(old)
            self.steps.append(Step(copied.source, {old: False}))

    def _order_by_breadth(self) -> None:
        """Runs each step as soon as it can, in the order in which they became ready."""
        made = {value: step for step in self.steps for value in step.last.results}
        missing = {step: {made[value] for value in step.reads if value in made} for step in self.steps}
        waiting: dict[Step, list[Step]] = collections.defaultdict(list)
        for step in self.steps:
            for other in missing[step]:
                waiting[other].append(step)
        ready = collections.deque(step for step in self.steps if not missing[step])
        self.steps = []
        while ready:
            step = ready.popleft()
            self.steps.append(step)
            for other in waiting[step]:
                missing[other].remove(step)
                if not missing[other]:
                    ready.append(other)

    def peak(self) -> int:
        """Most bytes that are held at once, besides the inputs; what a carry holds at first counts as nothing."""
        ends = {value: index for index, step in enumerate(self.steps) for value in step.reads}
        ends.update(dict.fromkeys(self.kept, len(self.steps)))
        held = {old: old.num_bytes for old in self.carry if old in ends}
        total = sum(held.values()) - sum(old.num_bytes for old in self.carry)
        most = total
        for index, step in enumerate(self.steps):
            written = [value for value in step.last.results if self._needs_room(value)]
            for value in written:
                for other in self._written_over(value, step):
                    if ends[other] == index and held.get(other) == value.num_bytes:
                        total -= held.pop(other)
                        break
            held.update((value, value.num_bytes) for value in written)
            total += sum(value.num_bytes for value in written)
            most = max(most, total + _inner_bytes(step.last))
            for value in [*step.reads, *written]:
                if ends.get(value, index) <= index:
                    total -= held.pop(value, 0)
        return most

    def _needs_room(self, value: Value) -> bool:
        """Whether a result has memory of its own: it is stored, and not written straight into a stack."""
        computed_there = value in self.stacked and value.source is not None and value.source.fuses
        return value in self.stored and not computed_there

    def _written_over(self, value: Value, step: Step) -> list[Value]:
        """Operands whose memory a result may take over."""
        loop = step.last.loop
        if loop is None:
            sides = _sides(value)
            found = [other for other, over in step.reads.items() if over and _sides(other) == sides]
        else:
            position = step.last.results.index(value)
            initial = loop.initial[position] if position < loop.num_carry else None
            found = [] if initial is None else [self._held(initial)]
        return [other for other in found if self.place.get(value, other) is other]


def _sides(value: Value) -> list[int]:
    """Sides of an array, in any order: products are free to lay them as their readers like."""
    return sorted(side for side in value.shape if side != 1)


def _readers(operations: list[Operation], held: Callable[[Value], Value]) -> dict[Value, list[Operation]]:
    """Operations that read a value, in order."""
    readers: dict[Value, list[Operation]] = collections.defaultdict(list)
    for operation in operations:
        for value in dict.fromkeys(map(held, operation.inputs)):
            readers[value].append(operation)
    return readers
