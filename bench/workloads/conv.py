"""Convolution and max pooling alone, XLA's own operations against those of `cedarjax.nn`, on batches of 10.

Three ways: the clients one after the other in straight-line code, all with the same weights; the same in a loop; and
vmapped, each client with weights of its own. Strides of convolutions are 1, padding is SAME.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import floor
from bench.measure import Case, Workload
from cedarjax import nn

BATCH_SIZE = 10
WAYS, FORMS, DIRECTIONS = ("in a row", "loop", "vmap"), ("XLA", "cedarjax"), ("forward", "gradient")


class Op(NamedTuple):
    """One operation on one client's batch."""

    num_in: int
    """Features in."""
    num_out: int
    """Features out."""
    side: int
    """Length of a spatial axis."""
    window: tuple[int, ...]
    """Size of the kernel, or of the pooling window, one number a spatial dimension."""
    num_groups: int = 1
    """Groups of features."""
    stride: int | None = None
    """Of a pooling; None for a convolution."""

    @property
    def name(self) -> str:
        """For the tables."""
        window = "x".join(map(str, self.window))
        if self.stride is not None:
            return f"max pool {window} / {self.stride}, {self.num_in} features of side {self.side}"
        groups = f" in {self.num_groups} groups" if self.num_groups > 1 else ""
        return f"conv {window}, {self.num_in} to {self.num_out}{groups}, side {self.side}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a batch."""
        return (BATCH_SIZE, *(self.side,) * len(self.window), self.num_in)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the weights; a pooling has one that it does not read."""
        return (1,) if self.stride is not None else (*self.window, self.num_in // self.num_groups, self.num_out)

    def fun(self, form: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`fun(x, weights)`."""
        if self.stride is not None:
            strides = (self.stride,) * len(self.window)
            if form == "XLA":
                return lambda x, weights: nnx.max_pool(x, window_shape=self.window, strides=strides)
            return lambda x, weights: nn.max_pool(x, self.window, strides)
        conv = jax.lax.conv_general_dilated if form == "XLA" else nn.conv_general_dilated
        spatial = "HW"[: len(self.window)]
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        ones = (1,) * len(self.window)
        return lambda x, weights: conv(
            x, weights, ones, "SAME", dimension_numbers=numbers, feature_group_count=self.num_groups
        )

    def work(self, direction: str, num_clients: int, dtype: Any) -> floor.Work:
        """Products that are not with padding, or comparisons; the input is read, the outcome written."""
        if self.stride is None:
            pixels = [self.side * size - size // 2 * (size // 2 + 1) for size in self.window]
            operations = 2 * math.prod(pixels) * self.num_in * self.num_out // self.num_groups
        else:
            places = [size * ((self.side - size) // self.stride + 1) for size in self.window]
            operations = math.prod(places) * self.num_in
        times = 3 if direction == "gradient" and self.stride is None else 1
        num_bytes = 2 * num_clients * math.prod(self.input_shape) * jnp.dtype(dtype).itemsize
        return floor.Work(times * num_clients * BATCH_SIZE * operations, num_bytes)


OPS = (
    Op(1, 16, 28, (3, 3)),
    Op(16, 32, 14, (3, 3)),
    Op(32, 32, 14, (3, 3), num_groups=32),
    Op(3, 32, 100, (5,)),
    Op(32, 64, 50, (5,)),
    Op(16, 16, 28, (2, 2), stride=2),
    Op(16, 16, 27, (3, 3), stride=2),
)


def one_case(op: Op, direction: str, form: str, way: str, num_clients: int, dtype: Any) -> Case:
    """One operation in one form and way."""
    rng = np.random.default_rng(0)
    own_weights = (num_clients,) if way == "vmap" else ()
    x, weights = (
        jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for shape in ((num_clients, *op.input_shape), (*own_weights, *op.kernel_shape))
    )
    forward = op.fun(form)

    def one_client(x: jax.Array, weights: jax.Array) -> Any:
        if direction == "forward":
            return forward(x, weights)
        # The activation is there because without one the incoming gradient would be a constant.
        return jax.grad(lambda x, weights: jnp.square(forward(x, weights)).sum(), argnums=(0, 1))(x, weights)

    def fun(x: jax.Array, weights: jax.Array) -> Any:
        if way == "vmap":
            return jax.vmap(one_client)(x, weights)
        if way == "loop":
            return jax.lax.map(lambda row: one_client(row, weights), x)
        return [one_client(x[index], weights) for index in range(num_clients)]

    work = op.work(direction, num_clients, dtype)
    return Case(f"{form}, {way}", f"{op.name}, {direction}", fun, (x, weights), num_clients, work)


def cases(num_clients: int, dtype: Any) -> Sequence[Case]:
    """Everything."""
    return [
        one_case(op, direction, form, way, num_clients, dtype)
        for op in OPS
        for direction in DIRECTIONS
        for way in WAYS
        for form in FORMS
    ]


WORKLOAD = Workload(
    title=f"conv: one operation on a batch of {BATCH_SIZE}, XLA's form against that of cedarjax.nn",
    unit="client",
    num_clients=(10,),
    layouts=cases,
)
