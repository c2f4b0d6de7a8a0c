"""The rows and columns of the grid, rules and attacks by name, and one transformation that is any of the attacks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

import cedarjax as cj
from cedarjax import attacks, robust
from cedarjax.core import Aggregator

Knowledge = Literal["nothing", "own data", "honest updates", "the rule too"]


class Rule(NamedTuple):
    """One row."""

    make: Callable[[int, float], Aggregator]
    """`make(f, radius)`: the rule that expects `f` attackers; clipping has the radius."""
    label: str
    """Name in tables and figures."""
    knows_f: bool = True
    """Whether the rule depends on `f`."""
    min_clients: Callable[[int], int] = lambda f: 2 * f + 1
    """Fewest clients for which it is defined with `f` attackers."""


class Attack(NamedTuple):
    """One column."""

    make: Callable[[Aggregator], optax.GradientTransformation]
    """`make(rule)`: the attack, told of the rule that follows; only those that adapt to it listen."""
    label: str
    """Name in tables and figures."""
    knowledge: Knowledge
    """What attackers know beside the model that they received; labels of those that know the rule end in `*`."""


# Without the searches over all subsets (MDA, SMEA): attacks that adapt ask a rule some forty times a round.
RULES: dict[str, Rule] = {
    "mean": Rule(lambda f, radius: robust.mean(), "mean", knows_f=False, min_clients=lambda f: 1),
    "median": Rule(lambda f, radius: robust.median(), "median", knows_f=False),
    "geometric_median": Rule(lambda f, radius: robust.geometric_median(), "geometric median", knows_f=False),
    "centered_clipping": Rule(lambda f, radius: robust.centered_clipping(radius), "centred clipping", knows_f=False),
    "trimmed_mean": Rule(lambda f, radius: robust.trimmed_mean(f), "trimmed mean"),
    "meamed": Rule(lambda f, radius: robust.meamed(f), "MeaMed"),
    "phocas": Rule(lambda f, radius: robust.phocas(f), "Phocas"),
    "krum": Rule(lambda f, radius: robust.krum(f), "Krum", min_clients=lambda f: 2 * f + 3),
    "multi_krum": Rule(lambda f, radius: robust.multi_krum(f), "Multi-Krum", min_clients=lambda f: 2 * f + 3),
    "bulyan": Rule(lambda f, radius: robust.bulyan(f), "Bulyan", min_clients=lambda f: 4 * f + 3),
    "cge": Rule(lambda f, radius: robust.cge(f), "CGE"),
    "caf": Rule(lambda f, radius: robust.caf(f), "CAF"),
    "dnc": Rule(lambda f, radius: robust.dnc(f), "DnC"),
    "arc+trimmed_mean": Rule(lambda f, radius: robust.arc(f, robust.trimmed_mean(f)), "ARC + trimmed mean"),
    "bucketing+geometric_median": Rule(
        lambda f, radius: robust.bucketing(2, robust.geometric_median()),
        "buckets + geom. median",
        knows_f=False,
        min_clients=lambda f: 4 * f + 1,
    ),
    "nnm+trimmed_mean": Rule(lambda f, radius: robust.nnm(f, robust.trimmed_mean(f)), "NNM + trimmed mean"),
    "nnm+krum": Rule(lambda f, radius: robust.nnm(f, robust.krum(f)), "NNM + Krum", min_clients=lambda f: 2 * f + 3),
    "nnm+geometric_median": Rule(lambda f, radius: robust.nnm(f, robust.geometric_median()), "NNM + geom. median"),
}

ATTACKS: dict[str, Attack] = {
    "none": Attack(lambda rule: optax.identity(), "no attack", "nothing"),
    "sign_flip": Attack(lambda rule: attacks.sign_flip(1.0), "sign flip", "own data"),
    "gaussian": Attack(lambda rule: attacks.gaussian(1.0), "Gaussian", "own data"),
    "label_flip": Attack(lambda rule: optax.identity(), "label flip", "own data"),
    "alie": Attack(lambda rule: attacks.alie(), "ALIE", "honest updates"),
    "ipm": Attack(lambda rule: attacks.ipm(0.5), "IPM", "honest updates"),
    "mimic": Attack(lambda rule: attacks.mimic(), "mimic", "honest updates"),
    "min_max": Attack(lambda rule: attacks.min_max("std"), "min-max", "honest updates"),
    "min_sum": Attack(lambda rule: attacks.min_sum("std"), "min-sum", "honest updates"),
    "optimised_alie": Attack(attacks.optimised_alie, "ALIE*", "the rule too"),
    "optimised_ipm": Attack(attacks.optimised_ipm, "IPM*", "the rule too"),
    "fang": Attack(attacks.fang, "Fang*", "the rule too"),
}

DEFAULT_RULES = (
    "mean",
    "median",
    "geometric_median",
    "centered_clipping",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "caf",
    "dnc",
    "nnm+trimmed_mean",
    "nnm+krum",
)


def one_of(choices: Sequence[optax.GradientTransformation], index: jax.Array) -> Aggregator:
    """The transformation `choices[index]`, with an index that the compiled program takes as an argument.

    Args:
      choices: transformations that keep the client axis.
      index: int32 scalar.

    Returns:
      A transformation whose state holds those of all choices; only the chosen one runs and moves on.

    Example:
      >>> import jax.numpy as jnp
      >>> which = one_of([optax.identity(), optax.scale(-1.0)], jnp.int32(1))
      >>> print(which.update(jnp.ones(2), which.init(jnp.zeros(2)))[0])
      [-1. -1.]
    """
    extended = [optax.with_extra_args_support(choice) for choice in choices]

    def init(params: Any) -> tuple:
        return tuple(choice.init(params) for choice in extended)

    def update(updates: Any, state: tuple, params: Any = None, **extra: Any) -> tuple[Any, tuple]:
        def branch(place: int) -> Callable[[Any, tuple], tuple[Any, tuple]]:
            def run(updates: Any, state: tuple) -> tuple[Any, tuple]:
                out, new = extended[place].update(updates, state[place], params, **extra)
                return out, (*state[:place], cj.take_info(new)[0], *state[place + 1 :])

            return run

        return jax.lax.switch(index, [branch(place) for place in range(len(extended))], updates, state)

    return optax.GradientTransformationExtraArgs(init, update)
