"""What a client sends in place of its whole update: the rows of the table."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cedarjax import compress, core, privacy
from experiments.leakage.problem import Work

DELTA = 1e-5
DistanceName = Literal["direction", "signs"]


class Sent(NamedTuple):
    """What is known of one upload."""

    observed: Any
    """Tree of numbers."""
    mask: Any
    """Tree of bools in their shapes: what was sent."""


ProtectFn = Callable[[Any, jax.Array, jax.Array], Sent]
"""`protect(upload, key, max_norm) -> Sent`; `max_norm` is a typical length of an upload."""


class Row(NamedTuple):
    """One row of the table."""

    label: str
    """Name in tables and figures."""
    group: str
    """Rows that stand together."""
    protect: ProtectFn
    """What is done to the upload."""
    work: Work = Work()
    """What is uploaded."""
    distances: tuple[DistanceName, ...] = ("direction",)
    """What attackers compare by; the best is told."""
    cedar: dict[str, Any] | None = None
    """Options of Cedar's filter, whose mask is then the upload's."""
    has_head: bool = True
    """Whether labels can be read off the last layer; else they are guessed along."""


def _all(upload: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ones(x.shape, bool), upload)


def whole(upload: Any, key: jax.Array, max_norm: jax.Array) -> Sent:
    """Nothing is done."""
    return Sent(upload, _all(upload))


def only(layers: Sequence[str], *, left_out: bool = False) -> ProtectFn:
    """Some layers are sent, or all but them."""

    def protect(upload: Any, key: jax.Array, max_norm: jax.Array) -> Sent:
        chosen = core.in_part(upload, layers)
        mask = jax.tree.map(lambda c, x: jnp.full(x.shape, c != left_out), chosen, upload)
        return Sent(jax.tree.map(lambda m, x: jnp.where(m, x, 0), mask, upload), mask)

    return protect


def compressed(compressor: compress.Compressor, *, is_sparse: bool = False) -> ProtectFn:
    """What arrives of a compressed upload; of a sparse one, what is not 0 and its place."""

    def protect(upload: Any, key: jax.Array, max_norm: jax.Array) -> Sent:
        observed = compressor.decompress(compressor.compress(upload, compressor.init(upload), key)[0])
        return Sent(observed, jax.tree.map(lambda x: x != 0, observed) if is_sparse else _all(upload))

    return protect


def noised(epsilon: float) -> ProtectFn:
    """Clipped to a typical length, and noised by the client itself for one upload of that epsilon."""
    multiplier = 2 * gaussian_multiplier(epsilon, DELTA)

    def protect(upload: Any, key: jax.Array, max_norm: jax.Array) -> Sent:
        clipped, _ = privacy.clip_by_norm(upload, max_norm)
        noise = privacy.gaussian_noise(key, clipped)
        observed = jax.tree.map(lambda x, z: x + multiplier * max_norm * z, clipped, noise)
        return Sent(observed, _all(upload))

    return protect


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """Least noise, in units of the sensitivity, with which one release is `(epsilon, delta)`-private, exactly.

    `delta = Phi(1 / (2 s) - epsilon s) - exp(epsilon) Phi(-1 / (2 s) - epsilon s)` (Balle and Wang, `Improving the
    Gaussian Mechanism for Differential Privacy <https://arxiv.org/abs/1805.06530>`_, 2018), by bisection.

    Args:
      epsilon: above 0.
      delta: above 0 and below 1.

    Example:
      >>> print(f"{gaussian_multiplier(1.0, 1e-5):.2f}")
      3.73
    """

    def log_phi(z: float) -> float:
        if z > -30:
            return math.log(0.5 * math.erfc(-z / math.sqrt(2)))
        return -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2)

    def spent(s: float) -> float:
        second = epsilon + log_phi(-1 / (2 * s) - epsilon * s)
        return math.exp(log_phi(1 / (2 * s) - epsilon * s)) - math.exp(second)

    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= delta else (middle, high)
    return high


def _layers(names: Sequence[str]) -> dict[str, Row]:
    rows = {}
    for name in names:
        rows[f"without_{name}"] = Row(
            f"without {name}", "a layer stays away", only([name], left_out=True), has_head=name != "head"
        )
    for name in names:
        rows[f"only_{name}"] = Row(f"{name} alone", "a layer alone", only([name]), has_head=name == "head")
    return rows


def contenders(layers: Sequence[str], budget: int, share: float) -> dict[str, Row]:
    """All rows.

    Args:
      layers: the model's layers, the judged ones and the head.
      budget: bytes that Cedar's filter may spend on the judged layers.
      share: that share of all of their bytes.
    """
    rows = {
        "full": Row("whole upload", "one picture", whole),
        **_layers(layers),
        "cedar": Row("Cedar, 1 layer less", "Cedar", whole, cedar={"num_skipped": 1}),
        "cedar_budget": Row(f"Cedar, {share:.0%} of the bytes", "Cedar", whole, cedar={"max_bytes": budget}),
    }
    for percent in (10, 1):
        protect = compressed(compress.top_k(percent / 100), is_sparse=True)
        rows[f"top_{percent}"] = Row(f"top {percent} %", "compressed", protect)
    for bits in (8, 4, 1):
        protect, label = compressed(compress.uniform_quantize(bits)), f"{bits} bit" + "s" * (bits > 1)
        rows[f"bits_{bits}"] = Row(label, "compressed", protect)
    rows["sign"] = Row("signs", "compressed", compressed(compress.sign()), distances=("direction", "signs"))
    for epsilon in (10, 100, 1_000, 10_000, 100_000):
        rows[f"noise_{epsilon}"] = Row(f"noise, ε={epsilon:,}", "noise", noised(epsilon))
    for count in (2, 4, 8, 16):
        rows[f"sum_{count}"] = Row(f"sum of {count} clients", "a secure sum", whole, Work(num_clients=count))
    rows["batch"] = Row("a batch of 4", "more pictures", whole, Work(num_images=4, batch_size=4))
    rows["epoch"] = Row("4 steps of 1", "more pictures", whole, Work(num_images=4, batch_size=1))
    rows["slow_epoch"] = Row(
        "4 steps, rate / 10", "more pictures", whole, Work(num_images=4, batch_size=1, slowness=10)
    )
    return rows
