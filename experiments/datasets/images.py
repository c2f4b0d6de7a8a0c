"""`omniglot` and `mnist`: images with clients made of tasks, of a published split, or of a Dirichlet draw."""

import os

import numpy as np

from cedarjax.data import class_tasks, dirichlet_by_class
from experiments.datasets import sources
from experiments.datasets.federation import (
    NEW,
    TRAIN,
    VALIDATION,
    Federation,
    assemble,
    draw_roles,
    from_tasks,
    shuffled_halves,
    subsample,
)

NUM_DRAWERS = 20
OMNIGLOT_ROLES = (100, 20, 40)
MNIST_CLASSES = 10
PFLLIB_ROLES = (13, 2, 5)
DIRICHLET_ROLES = (100, 10, 20)


def omniglot(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_ways: int = 5,
    num_shots: int = 1,
    num_stimuli: int = 20,
) -> Federation:
    """Handwritten characters of eight alphabets; a client is a few-shot task.

    Each client names `num_ways` of the 242 characters in a private order. They are divided 60 / 15 / 25 % between 100
    training, 20 validation and 40 new clients, so that a new client's characters were never seen. A training client has
    10 support and 10 query images per character, the others `num_shots` and 10.

    Args:
      data_dir: see `sources.data_directory`.
      seed: draws the characters of each role, the tasks, the images and the stimuli.
      num_ways: characters per client.
      num_shots: labelled images per character of validation and new clients, at most 10.
      num_stimuli: images of validation characters, without labels, that the server uses as stimuli.
    """
    if not 1 <= num_shots <= NUM_DRAWERS // 2:
        raise ValueError(f"num_shots must satisfy 1 <= num_shots <= {NUM_DRAWERS // 2}, got {num_shots}.")
    path = sources.find("omniglot", data_dir)
    source = sources.read(path, ("x28", "char_id"))
    sources.check_lengths(path, source, ("x28", "char_id"))
    sources.check_shape(path, "x28", source["x28"], (None, 28, 28))
    x, character = _pixels(source["x28"]), source["char_id"]
    num_characters, counts = int(character.max()) + 1, np.bincount(character)
    if counts.min() != NUM_DRAWERS or counts.max() != NUM_DRAWERS:
        raise sources.DataError(
            f"{path}: char_id must name {NUM_DRAWERS} images of every character, got {counts.min()} to {counts.max()}."
        )
    rng = np.random.default_rng(seed)
    cuts = [int(0.6 * num_characters), int(0.75 * num_characters)]
    characters = np.split(rng.permutation(num_characters), cuts)
    pools = [np.flatnonzero(np.isin(character, chosen)) for chosen in characters]
    tasks = {
        code: class_tasks(
            x,
            character,
            num_clients=num_clients,
            num_classes=num_ways,
            num_support=NUM_DRAWERS // 2 if code == TRAIN else num_shots,
            num_query=NUM_DRAWERS // 2,
            pool=pool,
            seed=rng,
        )
        for code, num_clients, pool in zip((TRAIN, VALIDATION, NEW), OMNIGLOT_ROLES, pools, strict=True)
    }
    return from_tasks(
        "omniglot",
        tasks,
        num_outputs=num_ways,
        stimuli=x[rng.choice(pools[VALIDATION], num_stimuli, replace=False)],
        notes=(
            f"Tasks of {num_ways} characters; class k means another character to each client.",
            f"Labelled images per character of a new client: {num_shots}.",
            "Characters of training, validation and new clients are disjoint "
            f"({', '.join(str(len(chosen)) for chosen in characters)}).",
            "Stimuli: images of validation characters, without labels.",
        ),
    )


def mnist(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    alpha: float | None = None,
    max_per_client: int | None = None,
    num_stimuli: int = 20,
) -> Federation:
    """Handwritten digits of clients with unequal classes.

    Without `alpha`: the 20 clients of PFLlib's Dirichlet split (13 training, 2 validation, 5 new). With it: 100
    training and 10 validation clients share the original training images, 20 new clients the original test images, both
    by a Dirichlet draw over clients for each class. Rows of a client are shuffled and halved.

    Args:
      data_dir: see `sources.data_directory`.
      seed: draws the roles, the split, the images and the stimuli.
      alpha: concentration of the Dirichlet draw; None for PFLlib's split.
      max_per_client: images kept of a client, default 600 for PFLlib's split and 100 for a Dirichlet draw.
      num_stimuli: images of validation clients, without labels, that the server uses as stimuli.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}.")
    if max_per_client is not None and max_per_client < 4:
        raise ValueError(f"max_per_client must be at least 4, got {max_per_client}.")
    path = sources.find("mnist", data_dir)
    source = sources.read(path, ("x", "y", "client_id", "from_t10k"))
    sources.check_lengths(path, source, ("x", "y", "client_id", "from_t10k"))
    sources.check_shape(path, "x", source["x"], (None, 28, 28))
    sources.check_range(path, "y", source["y"], 0, MNIST_CLASSES - 1)
    rng = np.random.default_rng(seed)
    if alpha is None:
        owned, role, note = _pfllib_clients(source, rng, max_per_client or 600)
    else:
        owned, role, note = _dirichlet_clients(source, rng, alpha, max_per_client or 100)

    rows = np.concatenate(owned)
    starts = np.cumsum([0, *map(len, owned)])
    clients = [
        shuffled_halves(rng, np.arange(start, stop)) for start, stop in zip(starts[:-1], starts[1:], strict=True)
    ]
    unlabelled = np.concatenate([part for part, code in zip(owned, role, strict=True) if code == VALIDATION])
    return assemble(
        "mnist",
        task="classification",
        x=_pixels(source["x"][rows]),
        y=source["y"][rows],
        clients=clients,
        role=role,
        num_outputs=MNIST_CLASSES,
        stimuli=_pixels(source["x"][rng.choice(unlabelled, num_stimuli, replace=False)]),
        class_names=tuple(map(str, range(MNIST_CLASSES))),
        notes=(
            note,
            "Rows shuffled within a client, then halved.",
            "Stimuli: images of validation clients, without labels.",
        ),
    )


def _pfllib_clients(
    source: dict[str, np.ndarray], rng: np.random.Generator, max_per_client: int
) -> tuple[list[np.ndarray], np.ndarray, str]:
    role = draw_roles(rng, *PFLLIB_ROLES)
    owned = [
        subsample(rng, np.flatnonzero(source["client_id"] == client), max_per_client) for client in range(len(role))
    ]
    return owned, role, f"PFLlib's split over 20 clients, at most {max_per_client} random images each."


def _dirichlet_clients(
    source: dict[str, np.ndarray], rng: np.random.Generator, alpha: float, max_per_client: int
) -> tuple[list[np.ndarray], np.ndarray, str]:
    num_train, num_validation, num_new = DIRICHLET_ROLES
    owned = []
    for is_pool, num_clients in ((~source["from_t10k"], num_train + num_validation), (source["from_t10k"], num_new)):
        pool = np.flatnonzero(is_pool)
        parts = dirichlet_by_class(source["y"][pool], num_clients, alpha=alpha, min_examples=10, seed=rng)
        owned += [subsample(rng, pool[part], max_per_client) for part in parts]
    role = np.repeat(np.array([TRAIN, VALIDATION, NEW], np.int8), DIRICHLET_ROLES)
    role[: num_train + num_validation] = rng.permutation(role[: num_train + num_validation])
    note = f"Dirichlet split with alpha = {alpha}, at most {max_per_client} random images per client."
    return owned, role, note + " New clients share the original test images."


def _pixels(images: np.ndarray) -> np.ndarray:
    """`[n, 28, 28]` bytes to `[n, 28, 28, 1]` float32 in [0, 1]."""
    return images[..., None].astype(np.float32) / 255
