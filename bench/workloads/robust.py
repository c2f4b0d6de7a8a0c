"""Aggregation rules alone: every rule on a matrix of updates, and ByzFL's where it has the same.

A tenth of the clients is assumed Byzantine. Client `i` uploads a common direction of norm 10 plus noise of norm about
`30 s_i` with `s` from 1/2 to 3/2, so that which clients a rule selects does not hang on the last digit. `mda` and
`smea` go through all subsets, and are measured where there are few: 10 clients, 2 of them Byzantine.

    python -m bench robust --peers                          # beside ByzFL, on NumPy's arrays and on torch's
    python -m bench robust --rules krum median --weighted   # two rules, with weights as a round gives them
    python -m bench robust --params 10000000                # 4 GB of updates, and the temporaries beside them
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj
from bench import floor
from bench.layouts import Layout, meshes
from bench.measure import Case, Duel, Workload
from cedarjax import robust

NUM_PARAMS, MOST_SECONDS = 100_000, 30.0
DIRECTION_NORM, NOISE_NORM = 10.0, 30.0
CLIP, LARGE_RADIUS, SMALL_RADIUS = 30.0, 100.0, 15.0  # the second is larger than every norm, the third smaller
FEW = (10, 2)  # clients, and Byzantine ones, where a rule goes through all subsets
Steps = tuple[tuple[str, dict[str, float]], ...]


class Rule(NamedTuple):
    """A rule, what it costs, and who else has it."""

    make: Callable[[int, int, Any], cj.Aggregator]
    """`make(num_clients, f, direction)`, the last one for a rule that trusts a server's update."""
    passes: int | None = None
    """Products of all updates with a vector that it takes at the least, `2 C D` operations each; None for a product of
    all pairs and one with a vector."""
    byzfl: Callable[[int, int], Steps] | None = None
    """`byzfl(num_clients, f)`: names and arguments in ByzFL, one after the other; None if it has no such rule."""
    is_compared: bool = True
    """Whether ByzFL's result is the same: not where one of the two draws at random, or is not exact."""
    sizes: tuple[int, int] | None = None
    """Clients and Byzantine ones, if not those that are asked for."""


def theirs(name: str, **arguments: float) -> Callable[[int, int], Steps]:
    """A rule of ByzFL with these arguments."""
    return lambda n, f: ((name, arguments),)


def theirs_with_f(name: str, **arguments: float) -> Callable[[int, int], Steps]:
    """The same with the number of Byzantine clients."""
    return lambda n, f: ((name, {"f": f, **arguments}),)


def before_mean(steps: Callable[[int, int], Steps]) -> Callable[[int, int], Steps]:
    """What ByzFL puts before a rule, and then the mean."""
    return lambda n, f: (*steps(n, f), ("Average", {}))


RULES = {
    "mean": Rule(lambda n, f, d: robust.mean(), 1, theirs("Average")),
    "median": Rule(lambda n, f, d: robust.median(), 1, theirs("Median")),
    "trimmed_mean": Rule(lambda n, f, d: robust.trimmed_mean(f), 1, theirs_with_f("TrMean")),
    "meamed": Rule(lambda n, f, d: robust.meamed(f), 1, theirs_with_f("Meamed")),
    "phocas": Rule(lambda n, f, d: robust.phocas(f), 1),
    "geometric_median": Rule(
        lambda n, f, d: robust.geometric_median(0.1, 3, "zero"), 6, theirs("GeometricMedian", nu=0.1, T=3)
    ),
    "geometric_median_100": Rule(lambda n, f, d: robust.geometric_median(num_iters=100)),
    "krum": Rule(lambda n, f, d: robust.krum(f, num_neighbors=n - f - 1), None, theirs_with_f("Krum")),
    "multi_krum": Rule(
        lambda n, f, d: robust.multi_krum(f, num_selected=n - f, num_neighbors=n - f - 1),
        None,
        theirs_with_f("MultiKrum"),
    ),
    "bulyan": Rule(lambda n, f, d: robust.bulyan(f)),
    "mda": Rule(lambda n, f, d: robust.mda(f), None, theirs_with_f("MDA"), sizes=FEW),
    "mda_approximate": Rule(lambda n, f, d: robust.mda(f)),
    "smea": Rule(lambda n, f, d: robust.smea(f), None, theirs_with_f("SMEA"), is_compared=False, sizes=FEW),
    "caf": Rule(lambda n, f, d: robust.caf(f), None, theirs_with_f("CAF"), is_compared=False),
    "centered_clipping": Rule(
        lambda n, f, d: robust.centered_clipping(LARGE_RADIUS), 2, theirs("CenteredClipping", L=1, tau=LARGE_RADIUS)
    ),
    "centered_clipping_tight": Rule(
        lambda n, f, d: robust.centered_clipping(SMALL_RADIUS), 2, theirs("CenteredClipping", L=1, tau=SMALL_RADIUS)
    ),
    "norm_clip": Rule(lambda n, f, d: robust.norm_clip(CLIP), 2),
    "cge": Rule(lambda n, f, d: robust.cge(f), 2),
    "monna": Rule(lambda n, f, d: robust.monna(f, 0), 2, theirs_with_f("MoNNA", idx=0)),
    "fltrust": Rule(lambda n, f, d: robust.fltrust(d), 2),
    "foolsgold": Rule(lambda n, f, d: robust.foolsgold()),
    "dnc": Rule(lambda n, f, d: robust.dnc(f)),
    "autogm": Rule(lambda n, f, d: robust.autogm()),
    "sign_majority": Rule(lambda n, f, d: robust.sign_majority(), 1),
    "rlr": Rule(lambda n, f, d: robust.rlr(n // 2), 1),
    "nnm": Rule(lambda n, f, d: robust.nnm(f, robust.mean()), None, before_mean(theirs_with_f("NNM"))),
    "bucketing": Rule(
        lambda n, f, d: robust.bucketing(2, robust.mean()), 1, before_mean(theirs("Bucketing", s=2)), is_compared=False
    ),
    "arc": Rule(lambda n, f, d: robust.arc(f, robust.mean()), 2, before_mean(theirs_with_f("ARC"))),
    "clip": Rule(lambda n, f, d: robust.clip(CLIP, robust.mean()), 2, before_mean(theirs("Clipping", c=CLIP))),
}


class Inputs(NamedTuple):
    """What a rule aggregates."""

    updates: dict[str, jax.Array]
    """One leaf, `[C, D]`."""
    direction: dict[str, jax.Array]
    """`[D]`, what all updates have in common; it has the shape of the parameters."""


@functools.lru_cache(maxsize=2)  # those of the many and those of the few
def inputs(num_clients: int, num_params: int, dtype: Any) -> Inputs:
    """The same numbers in every run."""
    scales = np.random.default_rng(0).permutation(np.linspace(0.5, 1.5, num_clients, dtype=np.float32))

    @jax.jit
    def draw(scales: jax.Array) -> Inputs:
        common, own = jax.random.split(jax.random.key(0))
        root = jnp.sqrt(jnp.float32(num_params))
        direction = DIRECTION_NORM / root * jax.random.normal(common, (num_params,))
        noise = NOISE_NORM / root * jax.random.normal(own, (num_clients, num_params))
        updates = direction[None] + scales[:, None] * noise
        return Inputs({"w": updates.astype(dtype)}, {"w": direction.astype(dtype)})

    return jax.block_until_ready(draw(jnp.asarray(scales)))


@functools.lru_cache(maxsize=4)
def placed(num_clients: int, num_params: int, dtype: Any, layout: Layout) -> Inputs:
    """The same where the layout has them, one copy for all rules."""
    updates, direction = inputs(num_clients, num_params, dtype)
    return Inputs(layout.place(updates, num_clients), layout.place(direction))


def sizes(rule: Rule, num_clients: int) -> tuple[int, int]:
    """Clients, and Byzantine ones."""
    return rule.sizes or (num_clients, num_clients // 10)


def one_case(name: str, layout: Layout, num_clients: int, num_params: int, dtype: Any, is_weighted: bool) -> Case:
    """A rule in one layout; `num_clients` are those that take part."""
    rule = RULES[name]
    f = sizes(rule, num_clients)[1]
    updates, direction = placed(num_clients, num_params, dtype, layout)
    mesh = {} if layout.mesh is None else {"mesh": layout.mesh}

    def fun(updates: Any, direction: Any, weights: jax.Array | None, key: jax.Array) -> Any:
        aggregator = rule.make(num_clients, f, direction)
        state = aggregator.init(direction)
        return aggregator.update(updates, state, direction, weights=weights, key=key, **mesh)

    numbers = num_clients * num_params
    operations = numbers * (num_clients + 3 if rule.passes is None else 2 * rule.passes)
    work = floor.Work(operations, jnp.dtype(dtype).itemsize * (numbers + num_params))
    weights = layout.place(jnp.ones(num_clients, jnp.float32), num_clients) if is_weighted else None
    args = (updates, direction, weights, layout.place(jax.random.key(1)))
    return Case(layout.where, name, fun, args, 1, work, layout.num_devices)


def peer_task(name: str, library: str, num_clients: int, num_params: int) -> Any:
    """A rule for ByzFL."""
    from bench import peers  # what peers need is not needed without them

    steps = RULES[name].byzfl
    assert steps is not None
    updates = np.asarray(inputs(num_clients, num_params, jnp.dtype(jnp.float32)).updates["w"])
    return peers.RuleTask(steps(*sizes(RULES[name], num_clients)), library, updates)


def answer(output: Any) -> dict[str, np.ndarray]:
    """What a peer finds if it does the same."""
    return {"update": np.asarray(output[0]["w"])}


def duel(name: str, num_clients: int, num_params: int, dtype: Any, is_weighted: bool) -> Duel:
    """A rule, where the updates lie on one device and where they lie on all, and ByzFL's."""
    rule = RULES[name]
    count = sizes(rule, num_clients)[0]
    layouts = [Layout(None, mesh) for mesh in meshes() if mesh is None or count % mesh.size == 0]
    tasks: dict[str, tuple[str, Callable[[], Any]]] = {
        f"byzfl {library}": ("byzfl", functools.partial(peer_task, name, library, count, num_params))
        for library in ("numpy", "torch")
        if rule.byzfl is not None
    }
    return Duel(
        name=name,
        num_clients=count,
        num_params=num_params,
        cases=[one_case(name, layout, count, num_params, dtype, is_weighted) for layout in layouts],
        tasks=tasks,
        answer=answer,
        is_compared=rule.is_compared,
    )


def workload(*, num_params: int | None = None, names: Sequence[str] = (), is_weighted: bool = False) -> Workload:
    """Rules on updates of one size.

    Args:
      num_params: numbers in an update; default: 100,000.
      names: of the rules; default: all.
      is_weighted: with weights, all of them 1, as a round gives them; otherwise without, as peers have it.

    Returns:
      The workload.

    Raises:
      ValueError: if there is no rule of such a name.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"--rules must be among {', '.join(RULES)}, got {', '.join(unknown)}.")
    size = NUM_PARAMS if num_params is None else num_params

    def duels(num_clients: int, dtype: Any) -> list[Duel]:
        return [duel(name, num_clients, size, jnp.dtype(dtype), is_weighted) for name in names or RULES]

    return Workload(
        title=f"robust: aggregation rules on [C, {size:,}] updates{', weighted' if is_weighted else ''}",
        unit="call",
        num_clients=(100,),
        layouts=lambda num_clients, dtype: [case for one in duels(num_clients, dtype) for case in one.cases],
        most_seconds=MOST_SECONDS,
        duels=duels,
        configure=workload,
    )


WORKLOAD = workload()
