"""A jaxpr as operations on sized values: calls inlined, names that change nothing left out, bodies of loops apart.

Each operation says what a compiler may do with it: compute it within its readers, compute it more than once, write its
result over an operand. These are facts about kinds of operations; whether it is done is decided in `liveness`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from cedarjax.core.jaxprs import scan_counts

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
    convert_element_type cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite
    le lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow real reduce_precision rem
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh
    xor""".split()
)
MOVES = frozenset(
    """broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims gather iota pad reshape rev slice
    squeeze transpose""".split()
)
REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split()
)
COSTLY = REDUCTIONS | frozenset(
    """atan2 cbrt cos cosh digamma div dynamic_update_slice erf erf_inv erfc exp exp2 expm1 gather lgamma log log1p
    logistic pad pow rem rsqrt sin sinh sqrt tan tanh""".split()
)
SCRATCH = {"cumlogsumexp": 2, "cummax": 2, "cummin": 2, "cumprod": 2, "cumsum": 2, "random_bits": 3}
SAME = frozenset(
    """copy copy_p name optimization_barrier pvary random_unwrap random_wrap sharding_constraint
    stop_gradient""".split()
)
CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
}


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program."""

    shape: tuple[int, ...]
    """Its shape."""
    num_bytes: int
    """Its size on one device."""
    source: "Operation | None" = None
    """What computes it; None for the program's inputs and constants."""
    num_parts: int = 1
    """Devices of a mesh that it is split over."""


@dataclasses.dataclass(eq=False)
class Operation:
    """A line of the program, with at least one result."""

    name: str
    """Of the primitive, but `reshape` for all that keeps numbers in their order, `mul` for products without a sum."""
    inputs: list[Value]
    """What it reads, scalars written in the program left out."""
    results: list[Value]
    """What it computes."""
    fuses: bool = False
    """Whether it can be computed within its readers, and what it reads within itself."""
    loop: "Loop | None" = None
    """The body, of a scan or a while loop."""
    branches: "Sequence[Program]" = ()
    """The branches of a conditional."""

    @property
    def updates(self) -> bool:
        """Whether it changes some numbers of its first operand."""
        return self.name == "dynamic_update_slice" or self.name.startswith("scatter")

    def overwrites(self, position: int) -> bool:
        """Whether the result may be written over that operand, number by number."""
        return position == 0 if self.updates else self.name == "sort" or self.name in ELEMENTWISE

    @property
    def costly(self) -> bool:
        """Whether it is not worth computing twice."""
        return self.name in COSTLY

    @property
    def sums(self) -> bool:
        """Whether it makes few numbers of many."""
        return self.name in REDUCTIONS

    @property
    def scratch(self) -> int:
        """Bytes that it needs besides its operands and results."""
        return SCRATCH.get(self.name, 0) * sum(result.num_bytes for result in self.results)

    @property
    def spreads(self) -> bool:
        """Whether it reads a number many times."""
        return self.name == "broadcast_in_dim"

    @property
    def narrow(self) -> bool:
        """Whether at most one operand is as long as the result: computing it twice then reads little more."""
        length = math.prod(self.results[0].shape)
        return sum(math.prod(x.shape) >= length and not _made_of_little(x) for x in self.inputs) <= 1


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in the order of the trace."""

    inputs: list[Value]
    """One an argument."""
    outputs: list[Value | None]
    """One a result; None for a scalar written in the program."""
    operations: list[Operation]
    """All of them, needed or not."""

    def needed(self) -> list[Operation]:
        """Operations that the outputs rest on."""
        found: set[Operation] = set()
        pending = [value for value in self.outputs if value is not None]
        while pending:
            source = pending.pop().source
            if source is not None and source not in found:
                found.add(source)
                pending += source.inputs
        return [operation for operation in self.operations if operation in found]


@dataclasses.dataclass(eq=False)
class Loop:
    """A body that is run again and again: constants, then the carry, then slices in; the carry, then slices out."""

    body: Program
    """One turn."""
    num_consts: int
    """Inputs that stay the same."""
    num_carry: int
    """Inputs that each turn replaces."""
    initial: list[Value | None]
    """What the carry starts from."""


def array_bytes(aval: Any) -> int:
    """Bytes of an abstract value; tokens and the like have none."""
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def trace_program(jaxpr: Any) -> Program:
    """Reads a jaxpr, open or closed."""
    reader = _Reader()
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inputs = [_value(var.aval) for var in jaxpr.invars]
    return Program(inputs, reader.inline(jaxpr, inputs), reader.operations)


class _Reader:
    """Collects operations; one for each program."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def inline(self, jaxpr: Any, args: Sequence[Value | None]) -> list[Value | None]:
        """Reads the lines of a jaxpr, and returns what they return."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        values: dict[Any, Value | None] = {var: _value(var.aval) for var in jaxpr.constvars}
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value | None:
            return None if isinstance(atom, jex.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self._line(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _line(self, eqn: jex.JaxprEqn, args: list[Value | None]) -> list[Value | None]:
        name, params = eqn.primitive.name, eqn.params
        if name == "shard_map":
            return self._shard_map(eqn, args)
        if name in CALLS:
            return self.inline(params[CALLS[name]], args)
        if name in SAME or _changes_nothing(eqn):
            return args[: len(eqn.outvars)]
        if name == "select_n" and len(args) == 3 and args[1] is args[2] is not None:
            return [args[1]]
        if name == "split":
            return [self._add("slice", args, [var.aval], fuses=True)[0] for var in eqn.outvars]
        if name == "scan":
            return self._scan(eqn, args)
        avals = [var.aval for var in eqn.outvars]
        if name == "while":
            num_test, num_consts = params["cond_nconsts"], params["body_nconsts"]
            start = num_test + num_consts
            loop = Loop(trace_program(params["body_jaxpr"]), num_consts, len(args) - start, args[start:])
            return self._add(name, args[num_test:], avals, loop=loop)
        if name == "cond":
            return self._add(name, args, avals, branches=[trace_program(branch) for branch in params["branches"]])
        return self._add(_kind(eqn), args, avals, fuses=_fuses(eqn))

    def _shard_map(self, eqn: jex.JaxprEqn, args: list[Value | None]) -> list[Value | None]:
        """The program of one device, and how its ends are split over all of them."""
        inner = eqn.params["jaxpr"]
        for arg, var in zip(args, inner.invars, strict=True):
            if arg is not None and arg.num_parts == 1 and array_bytes(var.aval):
                arg.num_parts = max(1, arg.num_bytes // array_bytes(var.aval))
                arg.num_bytes //= arg.num_parts
        results = self.inline(inner, args)
        for value, atom, var in zip(results, inner.outvars, eqn.outvars, strict=True):
            if value is not None and value.source is not None and value.num_bytes:
                value.shape, value.num_parts = _shape(var), array_bytes(var.aval) // array_bytes(atom.aval)
        return results

    def _scan(self, eqn: jex.JaxprEqn, args: list[Value | None]) -> list[Value | None]:
        body, avals = eqn.params["jaxpr"], [var.aval for var in eqn.outvars]
        num_consts, num_carry = scan_counts(eqn)
        num_fixed = num_consts + num_carry
        if eqn.params["length"] != 1:
            loop = Loop(trace_program(body), num_consts, num_carry, args[num_consts:num_fixed])
            return self._add("scan", args, avals, loop=loop)
        slices = [
            arg and self._add("reshape", [arg], [var.aval], fuses=True)[0]
            for arg, var in zip(args[num_fixed:], body.jaxpr.invars[num_fixed:], strict=True)
        ]
        results = self.inline(body, [*args[:num_fixed], *slices])
        stacked = [
            self._add("reshape", [value], [aval], fuses=True)[0]
            for value, aval in zip(results[num_carry:], avals[num_carry:], strict=True)
        ]
        return [*results[:num_carry], *stacked]

    def _add(self, name: str, args: Sequence[Value | None], avals: Sequence[Any], **more: Any) -> list[Value | None]:
        if not avals:
            return []
        operation = Operation(name, [arg for arg in args if arg is not None], [_value(aval) for aval in avals], **more)
        for result in operation.results:
            result.source = operation
            if operation.fuses:  # what stays as long as it was stays split
                alike = [x.num_parts for x in operation.inputs if math.prod(x.shape) == math.prod(result.shape)]
                result.num_parts = max(alike, default=1)
                result.num_bytes //= result.num_parts
        self.operations.append(operation)
        return list(operation.results)


def _kind(eqn: jex.JaxprEqn) -> str:
    """Name of what the line does."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return "mul" if math.prod(_shape(eqn.invars[0])[axis] for axis in contracted) == 1 else name
    if name in ("squeeze", "expand_dims"):
        return "reshape"
    if name == "broadcast_in_dim":
        return "reshape" if math.prod(_shape(eqn.invars[0])) == math.prod(_shape(eqn.outvars[0])) else name
    if name == "transpose":
        kept = [axis for axis in eqn.params["permutation"] if _shape(eqn.invars[0])[axis] != 1]
        return "reshape" if kept == sorted(kept) else name
    return name


def _fuses(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive.name == "concatenate":  # along the last axis it would branch at every number
        return eqn.params["dimension"] != len(_shape(eqn.outvars[0])) - 1
    return _kind(eqn) in ELEMENTWISE | MOVES | REDUCTIONS


def _changes_nothing(eqn: jex.JaxprEqn) -> bool:
    """Whether all of the first operand is taken as it is: autodiff leaves many such lines."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        return eqn.params["new_dtype"] == _dtype(eqn.invars[0])
    if name == "pad":
        return not any(map(any, eqn.params["padding_config"]))
    return name in ("slice", "dynamic_slice", "concatenate") and _shape(eqn.invars[0]) == _shape(eqn.outvars[0])


def _made_of_little(value: Value) -> bool:
    return value.source is not None and value.source.name in ("broadcast_in_dim", "iota")


def _value(aval: Any) -> Value:
    return Value(tuple(getattr(aval, "shape", ())), array_bytes(aval))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype
