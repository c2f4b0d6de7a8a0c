"""What clients send: everything, fewer layers, fewer bits, fewer numbers, and all of these together."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import cedarjax as cj
from cedarjax import compress
from experiments.bytes.problem import Problem

RATES = (0.03, 0.1, 0.3)
"""Rates of the clients' SGD that every contender tries."""
RANK = 2
"""Of PowerSGD."""
SKETCH_ROWS = 5
"""Of FetchSGD."""


class Recipe(NamedTuple):
    """A contender, ready for `federated_round`."""

    local: cj.LocalUpdate
    """One client's work."""
    server: optax.GradientTransformation
    """What the server does with the uploads."""
    sent: Callable[[Any], jax.Array] | int
    """Bytes that a client uploads in a round: a number, or `info.local -> [C]`."""


class Contender(NamedTuple):
    """One row of the table."""

    label: str
    """Name in tables and figures."""
    make: Callable[[Problem, jax.Array], Recipe]
    """`make(problem, rate)`."""
    kind: str
    """What it belongs to, for the figure."""


def averaged(local: cj.LocalUpdate) -> Recipe:
    """Federated averaging of a local update that tells its bytes."""
    return Recipe(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)), lambda info: info.uploaded_bytes)


def filtered(p: Problem, rate: jax.Array, num_skipped: int) -> cj.LocalUpdate:
    """Cedar's filter around the same local work."""
    return cj.layers.upload_filter(p.local(rate), p.setting.model.features, p.stimuli, num_skipped=num_skipped)


def _full(p: Problem, rate: jax.Array) -> Recipe:
    return averaged(p.local(rate))._replace(sent=p.full_bytes)


def _cedar(num_skipped: int, make: Callable[[], compress.Compressor] | None = None) -> Callable[..., Recipe]:
    """Cedar's filter, and a compressor with memory around it."""

    def recipe(p: Problem, rate: jax.Array) -> Recipe:
        local = filtered(p, rate, num_skipped)
        return averaged(local if make is None else compress.with_error_feedback(local, make()))

    return recipe


def _compressed(make: Callable[[], compress.Compressor], *, memory: bool = False) -> Callable[..., Recipe]:
    """A compressor around the local work, with or without error feedback."""
    wrap = compress.with_error_feedback if memory else compress.with_compression
    return lambda p, rate: averaged(wrap(p.local(rate), make()))


def _powersgd(p: Problem, rate: jax.Array) -> Recipe:
    server = optax.chain(compress.powersgd_mean(RANK), optax.sgd(1.0))
    return Recipe(p.local(rate), server, -(-compress.powersgd_bits(p.params, RANK) // 8))


def _fetchsgd(p: Problem, rate: jax.Array) -> Recipe:
    """A tenth of the parameters in cells. Of what was tried on WISDM, momentum and subtracted errors did worse."""
    cells = max(1, p.full_bytes // 4 // (10 * SKETCH_ROWS))
    compressor = compress.count_sketch(SKETCH_ROWS, cells)
    rule = compress.fetchsgd(compressor, fraction=0.03, momentum=0.0, error="zero")
    told = averaged(compress.send_compressed(p.local(rate), compressor))
    return told._replace(server=optax.chain(rule, optax.sgd(1.0)))


_remembered = functools.partial(_compressed, memory=True)

MASK, QUANTISE, SPARSIFY, SUM, BOTH = "fewer layers", "fewer bits", "fewer numbers", "summed by the server", "together"
"""Kinds."""

CONTENDERS: dict[str, Contender] = {
    "fedavg": Contender("FedAvg", _full, "everything"),
    "cedar": Contender("Cedar's filter", _cedar(1), MASK),
    "cedar2": Contender("Cedar's filter, two layers", _cedar(2), MASK),
    "uniform8": Contender("8 bits", _compressed(lambda: compress.uniform_quantize(8)), QUANTISE),
    "uniform4": Contender("4 bits", _compressed(lambda: compress.uniform_quantize(4)), QUANTISE),
    "uniform2": Contender("2 bits", _compressed(lambda: compress.uniform_quantize(2)), QUANTISE),
    "qsgd": Contender("QSGD, 7 levels", _compressed(lambda: compress.qsgd(7)), QUANTISE),
    "terngrad": Contender("TernGrad", _compressed(lambda: compress.terngrad()), QUANTISE),
    "rotated2": Contender("rotated, 2 bits", _compressed(lambda: compress.rotated_quantize(2)), QUANTISE),
    "drive": Contender("DRIVE", _compressed(lambda: compress.drive()), QUANTISE),
    "eden2": Contender("EDEN, 2 bits", _compressed(lambda: compress.eden(2)), QUANTISE),
    "sign": Contender("sign, feedback", _remembered(lambda: compress.sign()), QUANTISE),
    "top_k10": Contender("top 10 %, feedback", _remembered(lambda: compress.top_k(0.1)), SPARSIFY),
    "top_k1": Contender("top 1 %, feedback", _remembered(lambda: compress.top_k(0.01)), SPARSIFY),
    "sampled_top_k1": Contender(
        "sampled top 1 %, feedback", _remembered(lambda: compress.sampled_top_k(0.01)), SPARSIFY
    ),
    "top_k1_forgets": Contender("top 1 %", _compressed(lambda: compress.top_k(0.01)), SPARSIFY),
    "random_k10": Contender("random 10 %", _compressed(lambda: compress.random_k(0.1)), SPARSIFY),
    "powersgd": Contender("PowerSGD, feedback", _remembered(lambda: compress.powersgd(RANK)), SPARSIFY),
    "powersgd_mean": Contender("PowerSGD, factors averaged", _powersgd, SUM),
    "fetchsgd": Contender("FetchSGD", _fetchsgd, SUM),
    "cedar_uniform4": Contender("filter + 4 bits, feedback", _cedar(1, lambda: compress.uniform_quantize(4)), BOTH),
    "cedar_eden2": Contender("filter + EDEN 2 bits, feedback", _cedar(1, lambda: compress.eden(2)), BOTH),
    "cedar_top_k1": Contender("filter + top 1 %, feedback", _cedar(1, lambda: compress.top_k(0.01)), BOTH),
}
