"""`wisdm` and `beijing-air`: sensor recordings whose clients are the wearers and stations that they come from."""

import os

import numpy as np

from experiments.datasets import sources
from experiments.datasets.federation import (
    CLIP,
    NEW,
    TRAIN,
    VALIDATION,
    ClientRows,
    Federation,
    assemble,
    draw_roles,
    first_per_class,
    shuffled_halves,
    standardise,
    subsample,
)

HETEROGENEITY = ("plain", "rotation", "labels")
WISDM_ROLES = (34, 6, 11)
BEIJING_ROLES = (7, 2, 3)
PM25 = 0


def wisdm(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    heterogeneity: str = "plain",
    num_shots: int = 5,
    num_stimuli: int = 20,
) -> Federation:
    """Six activities from the accelerometer of a watch: 34 training, 6 validation and 11 new wearers.

    A validation or new wearer labels the first `num_shots` windows of each activity in time, and is tested on all later
    ones; the windows of a training wearer are shuffled and halved.

    Args:
      data_dir: see `sources.data_directory`.
      seed: draws the wearers of each role, the halves, the private rotations or permutations, and the stimuli.
      heterogeneity: `"plain"`; `"rotation"`: every watch is worn in its own orientation, a random 3-D rotation of the
        axes; `"labels"`: every wearer names the activities in a private order.
      num_shots: support windows per class of validation and new wearers.
      num_stimuli: windows of validation wearers, without labels, that the server uses as stimuli.
    """
    if heterogeneity not in HETEROGENEITY:
        raise ValueError(f"heterogeneity must be one of {', '.join(HETEROGENEITY)}, got {heterogeneity!r}.")
    if num_shots < 1:
        raise ValueError(f"num_shots must be at least 1, got {num_shots}.")
    path = sources.find("wisdm", data_dir)
    source = sources.read(path, ("x", "y", "client_id", "user", "classes"))
    sources.check_lengths(path, source, ("x", "y", "client_id"))
    sources.check_shape(path, "x", source["x"], (None, 100, 3))
    sources.check_finite(path, "x", source["x"])
    num_clients, num_classes = len(source["user"]), len(source["classes"])
    if num_clients != sum(WISDM_ROLES):
        raise sources.DataError(f"{path}: user must name {sum(WISDM_ROLES)} wearers, got {num_clients}.")
    sources.check_range(path, "client_id", source["client_id"], 0, num_clients - 1)
    sources.check_range(path, "y", source["y"], 0, num_classes - 1)
    x, y, owner = source["x"].astype(np.float64), source["y"].astype(np.int32), source["client_id"]

    rng = np.random.default_rng(seed)
    role = draw_roles(rng, *WISDM_ROLES)
    notes = [
        "Training wearers: shuffled halves.",
        f"Validation and new wearers: support = their first {num_shots} windows of each class in time.",
    ]
    if heterogeneity == "rotation":
        for client in range(num_clients):
            x[owner == client] = x[owner == client] @ random_rotation(np.random.default_rng((seed, 1, client)))
        notes.append("The axes of every watch are turned by a private random rotation.")
    elif heterogeneity == "labels":
        for client in range(num_clients):
            private = np.random.default_rng((seed, 2, client)).permutation(num_classes).astype(np.int32)
            y[owner == client] = private[y[owner == client]]
        notes.append("Every wearer names the activities in a private order.")

    x = standardise(x, role[owner] == TRAIN)
    notes.append(f"Standardised by axis with the windows of training wearers, cut off at {CLIP:g} deviations.")
    clients = []
    for client in range(num_clients):
        rows = np.flatnonzero(owner == client)
        is_training = role[client] == TRAIN
        clients.append(shuffled_halves(rng, rows) if is_training else first_per_class(rows, y[rows], num_shots))
    stimuli = x[rng.choice(np.flatnonzero(role[owner] == VALIDATION), num_stimuli, replace=False)]
    notes.append("Stimuli: windows of validation wearers, without labels.")
    return assemble(
        "wisdm",
        task="classification",
        x=x,
        y=y,
        clients=clients,
        role=role,
        num_outputs=num_classes,
        stimuli=stimuli,
        class_names=tuple(map(str, source["classes"])) if heterogeneity != "labels" else None,
        client_names=tuple(map(str, source["user"])),
        notes=tuple(notes),
    )


def beijing_air(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    max_per_client: int = 1000,
    window: int = 1,
    num_shots: int = 50,
    num_stimuli: int = 20,
) -> Federation:
    """PM2.5 from the other sensors of a station: 7 training, 2 validation and 3 new stations.

    Inputs of an hour: the ten other sensors, sine and cosine of the hour, of the month and of the wind's direction.
    With `window > 1` an input is the series `[window, features]` that ends with the hour of the target.

    Args:
      data_dir: see `sources.data_directory`.
      seed: draws the stations of each role, the hours and the stimuli.
      max_per_client: hours per station, drawn at random from the complete ones.
      window: hours in an input.
      num_shots: hours that a validation or new station has labelled; training stations have shuffled halves.
      num_stimuli: inputs of validation stations, without targets, that the server uses as stimuli.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    if not 1 <= num_shots < max_per_client:
        raise ValueError(
            f"num_shots must satisfy 1 <= num_shots < max_per_client, got {num_shots} and {max_per_client}."
        )
    path = sources.find("beijing-air", data_dir)
    source = sources.read(path, ("sensors", "time", "wind_dir", "client_id", "stations"))
    sources.check_lengths(path, source, ("sensors", "time", "wind_dir", "client_id"))
    sources.check_shape(path, "sensors", source["sensors"], (None, 11))
    sources.check_shape(path, "time", source["time"], (None, 4))
    num_clients = len(source["stations"])
    if num_clients != sum(BEIJING_ROLES):
        raise sources.DataError(f"{path}: stations must name {sum(BEIJING_ROLES)} stations, got {num_clients}.")
    sources.check_range(path, "client_id", source["client_id"], 0, num_clients - 1)
    owner = source["client_id"]
    features, target, is_complete = _hours(source)

    rng = np.random.default_rng(seed)
    role = draw_roles(rng, *BEIJING_ROLES)
    ends = [_window_ends(np.flatnonzero(owner == client), is_complete, window) for client in range(num_clients)]
    for client, rows in enumerate(ends):
        if len(rows) <= num_shots:
            name = source["stations"][client]
            raise sources.DataError(
                f"{path}: station {name} must have more than {num_shots} complete hours, got {len(rows)}."
            )
    num_complete, num_hours = sum(map(len, ends)), len(owner)
    kept = [subsample(rng, rows, max_per_client) for rows in ends]
    hours = np.concatenate(kept)
    x = features[hours[:, None] + np.arange(1 - window, 1)] if window > 1 else features[hours]
    y = target[hours].astype(np.float64)
    station = owner[hours]
    seen = role[station] == TRAIN
    x = standardise(x, seen)
    target_mean, target_std = float(y[seen].mean()), float(y[seen].std())
    clients = []
    for client in range(num_clients):
        rows = rng.permutation(np.flatnonzero(station == client))
        cut = len(rows) // 2 if role[client] == TRAIN else num_shots
        clients.append(ClientRows(rows[:cut], rows[cut:]))
    stimuli = x[rng.choice(np.flatnonzero(role[station] == VALIDATION), num_stimuli, replace=False)]
    return assemble(
        "beijing-air",
        task="regression",
        x=x,
        y=(y - target_mean) / target_std,
        clients=clients,
        role=role,
        num_outputs=1,
        stimuli=stimuli,
        client_names=tuple(map(str, source["stations"])),
        target_mean=target_mean,
        target_std=target_std,
        notes=(
            f"Hours with a missing value in their window are dropped, not imputed: {num_complete} of {num_hours} stay.",
            f"At most {max_per_client} random hours per station, of which a new station has labelled {num_shots}.",
            f"Features (cut off at {CLIP:g} deviations) and target standardised with the training stations.",
            "The stations share the weather of the same hours.",
            f"New stations: {', '.join(source['stations'][role == NEW])}.",
            "Stimuli: inputs of validation stations, without targets.",
        ),
    )


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A `[3, 3]` rotation, uniform over all orientations."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def _hours(source: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sensors, time, wind = source["sensors"], source["time"], source["wind_dir"]
    angles = 2 * np.pi * np.stack([time[:, 3] / 24, (time[:, 1] - 1) / 12, wind / 16], axis=1)
    is_complete = np.isfinite(sensors).all(axis=1) & (wind >= 0)
    features = np.concatenate([np.delete(sensors, PM25, axis=1), np.sin(angles), np.cos(angles)], axis=1).astype(
        np.float32
    )
    return features, sensors[:, PM25], is_complete


def _window_ends(rows: np.ndarray, is_complete: np.ndarray, window: int) -> np.ndarray:
    """Rows of one station, an unbroken series of hours, that end `window` complete hours."""
    incomplete = np.concatenate([[0], np.cumsum(~is_complete[rows])])
    ends = np.arange(window, len(rows) + 1)
    is_good = (incomplete[ends] - incomplete[ends - window]) == 0
    return rows[ends[is_good] - 1]
