"""The algorithms, each with one learning rate that is tuned over a grid of the same size."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from cedarjax import local, meta, personal, robust, server
from cedarjax.core import LocalUpdate
from experiments.personalisation.problem import Problem

CLIENT_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SERVER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)


MANY_STEPS = 10
"""Inner steps where second derivatives are left out: the more of them, the more of the gradient tells how to adapt."""
HESSIAN_BATCH = 50
"""Batches of exact Per-FedAvg (the paper has 40): a Hessian of ten examples is mostly noise."""


class Recipe(NamedTuple):
    """An algorithm, ready for `federated_round`."""

    local: LocalUpdate
    """One client's work."""
    server: optax.GradientTransformation
    """What the server does with the uploads."""


class Contender(NamedTuple):
    """One row of the table."""

    label: str
    """Name in tables and figures."""
    make: Callable[[Problem, jax.Array], Recipe]
    """`make(problem, rate)`."""
    rates: tuple[float, ...] = CLIENT_RATES
    """Rates that are tried, of the clients' SGD or, where clients upload gradients, of the server's Adam."""
    newcomer: str = "model"
    """What a client that never took part begins with: its `"model"` by the algorithm, or what is `"shared"`."""
    weighting: str = "examples"
    """How clients are weighed."""
    needs_classes: bool = False
    """Whether a class must mean the same to all clients."""


def averaged(update: LocalUpdate) -> Recipe:
    """Federated averaging of a local update."""
    return Recipe(update, optax.chain(robust.mean(), optax.sgd(1.0)))


def by_adam(update: LocalUpdate, rate: jax.Array) -> Recipe:
    """The server steps along the mean of the clients' gradients."""
    return Recipe(update, optax.chain(robust.mean(), optax.adam(rate)))


def _inner(p: Problem) -> optax.GradientTransformation:
    return optax.sgd(p.inner_rate)


def _sgd(p: Problem, rate: jax.Array | float) -> LocalUpdate:
    return local.sgd(p.setting.loss_fn, optax.sgd(rate), batch_size=p.batch_size)


def _feddyn(p: Problem, rate: jax.Array) -> Recipe:
    update = local.feddyn(p.setting.loss_fn, optax.sgd(rate), 0.1, batch_size=p.batch_size)
    return Recipe(update, optax.chain(robust.mean(), server.feddyn(p.participation)))


def _fedproto(p: Problem, rate: jax.Array) -> Recipe:
    return averaged(
        personal.fedproto(
            p.setting.loss_fn,
            p.embed_fn,
            optax.sgd(rate),
            num_classes=p.setting.num_outputs,
            num_features=p.num_features,
            lam=1.0,
            batch_size=p.batch_size,
        )
    )


def is_body(name: str) -> bool:
    """Whether a parameter is not the head's."""
    return not name.startswith("head/")


CONTENDERS: dict[str, Contender] = {
    "fedavg": Contender("FedAvg", lambda p, r: averaged(_sgd(p, r))),
    "fedprox": Contender(
        "FedProx",
        lambda p, r: averaged(local.prox(0.1, p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size)),
    ),
    "scaffold": Contender(
        "SCAFFOLD",
        lambda p, r: averaged(
            local.scaffold(p.setting.loss_fn, r, batch_size=p.batch_size, participation=p.participation)
        ),
        weighting="uniform",
    ),
    "feddyn": Contender("FedDyn", _feddyn, weighting="uniform"),
    "fednova": Contender(
        "FedNova",
        lambda p, r: Recipe(
            local.fednova(p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size),
            optax.chain(robust.mean(), server.fednova(), optax.sgd(1.0)),
        ),
    ),
    "fedadam": Contender(
        "FedAdam",
        lambda p, r: Recipe(_sgd(p, 0.1), optax.chain(robust.mean(), server.fedadam(r))),
        rates=SERVER_RATES,
    ),
    "reptile": Contender(
        "Reptile",
        lambda p, r: averaged(meta.reptile(p.setting.loss_fn, optax.sgd(r), p.local_steps, batch_size=p.batch_size)),
    ),
    "cedar": Contender(
        "Cedar",
        lambda p, r: averaged(meta.cedar(p.setting.loss_fn, optax.sgd(r), optax.sgd(r), batch_size=p.batch_size)),
    ),
    "per_fedavg": Contender(
        "Per-FedAvg",
        lambda p, r: averaged(
            meta.per_fedavg(
                p.setting.loss_fn, p.inner_rate, optax.sgd(r), num_steps=p.local_steps, batch_size=HESSIAN_BATCH
            )
        ),
    ),
    "per_fedavg_fo": Contender(
        "Per-FedAvg (FO)",
        lambda p, r: averaged(
            meta.per_fedavg(
                p.setting.loss_fn,
                p.inner_rate,
                optax.sgd(r),
                num_steps=p.local_steps,
                batch_size=p.batch_size,
                mode="fo",
            )
        ),
    ),
    "maml": Contender(
        "MAML", lambda p, r: by_adam(meta.maml(p.setting.loss_fn, _inner(p), 1, mode="mixed"), r), rates=SERVER_RATES
    ),
    "fomaml": Contender(
        "FOMAML",
        lambda p, r: by_adam(meta.maml(p.setting.loss_fn, _inner(p), MANY_STEPS, first_order=True), r),
        rates=SERVER_RATES,
    ),
    "meta_sgd": Contender(
        "Meta-SGD", lambda p, r: by_adam(meta.meta_sgd(p.setting.loss_fn, 1, p.inner_rate), r), rates=SERVER_RATES
    ),
    "anil": Contender("ANIL", lambda p, r: by_adam(meta.anil(p.setting.loss_fn, _inner(p), 1), r), rates=SERVER_RATES),
    "imaml": Contender(
        "iMAML", lambda p, r: by_adam(meta.imaml(p.setting.loss_fn, _inner(p), MANY_STEPS, 1.0), r), rates=SERVER_RATES
    ),
    "ditto": Contender(
        "Ditto",
        lambda p, r: averaged(
            personal.ditto(_sgd(p, r), p.setting.loss_fn, optax.sgd(r), 0.1, batch_size=p.batch_size)
        ),
        newcomer="shared",
    ),
    "pfedme": Contender(
        "pFedMe",
        lambda p, r: averaged(
            personal.pfedme(
                p.setting.loss_fn,
                optax.sgd(r),
                1.0,
                0.5,
                num_rounds=p.local_steps,
                num_steps=5,
                batch_size=p.batch_size,
            )
        ),
        newcomer="shared",
    ),
    "apfl": Contender(
        "APFL",
        lambda p, r: averaged(personal.apfl(p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size)),
        newcomer="shared",
    ),
    "fedper": Contender(
        "FedPer", lambda p, r: averaged(personal.fedper(p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size))
    ),
    "fedrep": Contender(
        "FedRep", lambda p, r: averaged(personal.fedrep(p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size))
    ),
    "fedbabu": Contender(
        "FedBABU", lambda p, r: averaged(personal.fedbabu(p.setting.loss_fn, optax.sgd(r), batch_size=p.batch_size))
    ),
    "lg_fedavg": Contender(
        "LG-FedAvg",
        lambda p, r: averaged(personal.lg_fedavg(p.setting.loss_fn, optax.sgd(r), is_body, batch_size=p.batch_size)),
    ),
    "moon": Contender(
        "MOON",
        lambda p, r: averaged(personal.moon(p.setting.loss_fn, p.embed_fn, optax.sgd(r), batch_size=p.batch_size)),
    ),
    "fedala": Contender(
        "FedALA",
        lambda p, r: averaged(
            personal.fedala(p.setting.loss_fn, optax.sgd(r), adapted="head", batch_size=p.batch_size)
        ),
        newcomer="shared",
    ),
    "fedproto": Contender("FedProto", _fedproto, needs_classes=True),
}
