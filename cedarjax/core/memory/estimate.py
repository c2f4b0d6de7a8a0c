"""What a function of arrays will hold in memory, told before anything is compiled.

The model, in which only sizes matter:

- What is computed number by number, moved or summed up is not stored but computed by its readers, unless a reader is
  no such operation (a product, a sort, a loop, a result of the function, a concatenation along the last axis, one sum
  among several readers), or it is costly (a division, `exp`, `pad`, `gather`, a sum) and would be computed twice.
  Reshapes of what is stored are free.
- Steps run as soon as they can, in the order in which they became ready, as XLA's scheduler for CPUs has it. A result
  is held until its last reader is done, and takes over the memory of an operand of its size that it is the last to read
  and reads number by number.
- A loop holds its carry once, its stacked results whole, and what one turn of it holds. The new carry is written over
  the old one; where something else may still read the old one, that is copied first. A loop of one turn is no loop. A
  conditional holds what its larger branch does.
- Under `shard_map` all sizes are those of one device.

Measured against XLA on a CPU in float32, on whole rounds (SGD, Adam and second-order MAML; an MLP and two CNNs; 32 to
256 clients, with jax 0.8.2 up to 64; vmapped, in chunks, in a loop, streamed; SGD on the MLP also low-rank), the ratio
of `total` to XLA's:

=====================  ===========  ===========
model                  jax 0.10.2   jax 0.8.2
=====================  ===========  ===========
MLP 784-128-10         0.93 - 1.02  0.89 - 1.03
the same, low-rank     0.89 - 1.01  1.00 - 1.01
CNN 3x3, 20 k numbers  0.93 - 1.00  0.85 - 0.95
CNN 5x5, 1.7 M         0.87 - 1.15  0.87 - 1.03
MLP, vmapped MAML      0.68 - 0.69  1.00
=====================  ===========  ===========

The last row is the one outside a fifth: jax 0.10 gives the product with the adapted weights `W - lr * g` to another
library, and writes the constant `lr` out as one more matrix for each client. Rows of jax 0.8.2 may be further off where
a model is smaller (a CNN of one convolution: 0.52): there a sum computes what it sums once more.

What the model leaves out: room that a backend takes for a single operation, such as a convolution with another layout
inside; the conversion of bfloat16, which CPUs compute in float32; repeated expressions that XLA finds to be the same;
constants; donated arguments, whose memory the results could take.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from cedarjax.core.memory.liveness import program_bytes
from cedarjax.core.memory.program import array_bytes, trace_program
from cedarjax.core.names import leaf_names
from cedarjax.core.types import PyTree


class MemoryEstimate(NamedTuple):
    """Memory of one call, in bytes; on a mesh, on each device."""

    arguments: int
    """What is read of the arguments; `jit` drops the others."""
    results: int
    """What is returned."""
    temporaries: int
    """What is held besides, at the worst moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporaries


def memory_estimate(fun: Callable[..., PyTree], *args: PyTree) -> MemoryEstimate:
    """Peak memory of `jax.jit(fun)(*args)`, from its trace alone.

    Nothing is compiled and nothing runs, so that a layout of the client axis can be chosen before one is tried: give it
    the `step` of a `federated_round` or a `streamed_round`, or a vmapped `update`.

    Args:
      fun: pure function of arrays; not yet jitted or jitted, which makes no difference.
      *args: its arguments: trees of arrays, of numbers, or of `jax.ShapeDtypeStruct`, of which only shape and dtype are
        read.

    Returns:
      A `MemoryEstimate`. Arguments and results are exact, but that `jit` also drops arguments that a loop is given and
      does not need; the module's docstring says how temporaries are told, and how well.

    Raises:
      TypeError: if `fun` is not callable or an argument holds anything but arrays and numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = jax.ShapeDtypeStruct((100, 100), jnp.float32)
      >>> memory_estimate(lambda w: jnp.tanh(w @ w) @ w, weights)
      MemoryEstimate(arguments=40000, results=40000, temporaries=40000)
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {fun!r}.")
    for position, arg in enumerate(args):
        for name, leaf in zip(leaf_names(arg), jax.tree.leaves(arg), strict=True):
            if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
                leaf, bool | int | float | complex
            ):
                where = f" at {name!r}" if name else ""
                raise TypeError(f"args[{position}] must hold arrays or jax.ShapeDtypeStruct, got {leaf!r}{where}.")
    traced = jax.make_jaxpr(fun)(*args)
    program = trace_program(traced)
    read = {value for operation in program.needed() for value in operation.inputs}.union(program.outputs)
    results = [
        array_bytes(var.aval) if value is None else value.num_bytes
        for value, var in zip(program.outputs, traced.jaxpr.outvars, strict=True)
    ]
    return MemoryEstimate(
        arguments=sum(value.num_bytes for value in program.inputs if value in read),
        results=sum(results),
        temporaries=program_bytes(program),
    )
