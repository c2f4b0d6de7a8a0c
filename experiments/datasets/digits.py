"""`digits`: the handwritten digits that scikit-learn brings along; the embedded default.

As tasks, every client names some of the ten digits in a private order, so no model without adaptation can be right for
two of them; a new client has one labelled image per class, and the images of training, validation and new clients come
from disjoint pools. With a Dirichlet draw a class means the same to all clients, which have unequal classes, and every
image belongs to one client.
"""

import numpy as np
from sklearn.datasets import load_digits

from cedarjax.data import class_tasks, dirichlet_by_class, split_pools
from experiments.datasets.federation import (
    NEW,
    TRAIN,
    VALIDATION,
    Federation,
    assemble,
    draw_roles,
    from_tasks,
    shuffled_halves,
)

NUM_CLIENTS = {TRAIN: 70, VALIDATION: 10, NEW: 20}
POOLS = (0.6, 0.15, 0.25)
TRAIN_SHOTS, NUM_QUERY = 10, 10
NUM_WAYS, NUM_SHOTS = 5, 1
DIRICHLET_ROLES = (40, 8, 12)


def digits(
    *,
    seed: int = 0,
    alpha: float | None = None,
    num_ways: int | None = None,
    num_shots: int | None = None,
    num_stimuli: int = 20,
) -> Federation:
    """Builds 70 training, 10 validation and 20 new clients that are tasks, or with `alpha` 40, 8 and 12 that are not.

    Args:
      seed: draws the pools, the tasks or the split, the images and the stimuli.
      alpha: concentration of a Dirichlet draw over clients for each class; None for tasks.
      num_ways: digits that a task names, default 5.
      num_shots: support images per class of validation and new tasks, default 1; training tasks have 10. All have 10
        query images per class.
      num_stimuli: images of the validation clients, without labels, that the server uses as stimuli.
    """
    data, labels = load_digits(return_X_y=True)
    x, rng = (data / 16).astype(np.float32), np.random.default_rng(seed)
    if alpha is None:
        ways = NUM_WAYS if num_ways is None else num_ways
        shots = NUM_SHOTS if num_shots is None else num_shots
        return _tasks(x, labels, rng, num_ways=ways, num_shots=shots, num_stimuli=num_stimuli)
    for name, value in (("num_ways", num_ways), ("num_shots", num_shots)):
        if value is not None:
            raise ValueError(f"{name} must be None with alpha, for only tasks have it, got {value}.")
    return _dirichlet(x, labels, rng, alpha=alpha, num_stimuli=num_stimuli)


def _tasks(
    x: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, num_ways: int, num_shots: int, num_stimuli: int
) -> Federation:
    pools = dict(zip((TRAIN, VALIDATION, NEW), split_pools(labels, POOLS, seed=rng), strict=True))
    tasks = {
        code: class_tasks(
            x,
            labels,
            num_clients=num_clients,
            num_classes=num_ways,
            num_support=TRAIN_SHOTS if code == TRAIN else num_shots,
            num_query=NUM_QUERY,
            pool=pools[code],
            seed=rng,
        )
        for code, num_clients in NUM_CLIENTS.items()
    }
    sizes = ", ".join(str(len(pool)) for pool in pools.values())
    return from_tasks(
        "digits",
        tasks,
        num_outputs=num_ways,
        stimuli=x[rng.choice(pools[VALIDATION], num_stimuli, replace=False)],
        notes=(
            f"Every client names {num_ways} of the 10 digits in a private order; class k means another digit to each.",
            f"Images of training, validation and new clients are disjoint ({sizes} images).",
            f"Labelled images per class of a new client: {num_shots}; it is tested on {NUM_QUERY} others per class.",
            "Stimuli: images of the validation pool, without labels.",
        ),
    )


def _dirichlet(
    x: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, alpha: float, num_stimuli: int
) -> Federation:
    owned = dirichlet_by_class(labels, sum(DIRICHLET_ROLES), alpha=alpha, min_examples=10, seed=rng)
    role = draw_roles(rng, *DIRICHLET_ROLES)
    unlabelled = np.concatenate([rows for rows, code in zip(owned, role, strict=True) if code == VALIDATION])
    return assemble(
        "digits",
        task="classification",
        x=x,
        y=labels,
        clients=[shuffled_halves(rng, rows) for rows in owned],
        role=role,
        num_outputs=10,
        stimuli=x[rng.choice(unlabelled, num_stimuli, replace=False)],
        class_names=tuple(map(str, range(10))),
        notes=(
            f"Dirichlet split with alpha = {alpha}: every image belongs to one client.",
            "Rows shuffled within a client, then halved.",
            "Stimuli: images of validation clients, without labels.",
        ),
    )
