"""`synthetic-iot`: generated devices, each with a daily cycle and a sensor of its own; regression.

Device `i` sees the time of day `t` in [-1, 1) and an ambient reading `r`, and has to predict its load

    y = a_i sin(pi t + p_i) + g_i (r - b_i) + noise,        r = r* + b_i,

with amplitude `a_i` in [0.5, 2], phase `p_i` in [-pi, pi), gain `g_i` in [-1, 1] and sensor bias `b_i` of deviation
0.5. The bias shifts the inputs between devices, the rest shifts what they mean: without a device's own data the best
guess is a constant.
"""

import numpy as np

from experiments.datasets.federation import NEW, TRAIN, ClientRows, Federation, assemble, draw_roles

SIZES = {"small": (24, 6, 10), "medium": (100, 10, 20), "large": (1000, 50, 100)}
NUM_SUPPORT, NUM_QUERY = 20, 40


def synthetic_iot(*, seed: int = 0, size: str = "medium", num_shots: int = 10, num_stimuli: int = 20) -> Federation:
    """Generates the federation.

    Args:
      seed: of every draw.
      size: `"small"`, `"medium"` or `"large"`: 24 / 100 / 1000 training devices.
      num_shots: support examples of validation and new devices; training devices have 20. All have 40 query examples.
      num_stimuli: the server's inputs, from devices that exist nowhere else.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
    if num_shots < 1:
        raise ValueError(f"num_shots must be at least 1, got {num_shots}.")
    rng = np.random.default_rng(seed)
    role = draw_roles(rng, *SIZES[size])
    xs, ys, clients, start = [], [], [], 0
    for code in role:
        num_support = NUM_SUPPORT if code == TRAIN else num_shots
        x, y = _device(rng, num_support + NUM_QUERY)
        rows = np.arange(start, start + len(y))
        clients.append(ClientRows(rows[:num_support], rows[num_support:]))
        xs.append(x)
        ys.append(y)
        start += len(y)
    x, y = np.concatenate(xs), np.concatenate(ys)
    seen = np.concatenate(
        [[*rows.support, *rows.query] for rows, code in zip(clients, role, strict=True) if code == TRAIN]
    )
    mean, std = float(y[seen].mean()), float(y[seen].std())
    stimuli = np.concatenate([_device(rng, 1)[0] for _ in range(num_stimuli)])
    return assemble(
        "synthetic-iot",
        task="regression",
        x=x,
        y=(y - mean) / std,
        clients=clients,
        role=role,
        num_outputs=1,
        stimuli=stimuli,
        target_mean=mean,
        target_std=std,
        notes=(
            f"Generated: {len(role)} devices, {np.sum(role == NEW)} of them new.",
            "Stimuli: inputs of generated devices that are not in the federation.",
        ),
    )


def _device(rng: np.random.Generator, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    amplitude, phase = rng.uniform(0.5, 2.0), rng.uniform(-np.pi, np.pi)
    gain, bias = rng.uniform(-1.0, 1.0), rng.normal(0.0, 0.5)
    time = rng.uniform(-1.0, 1.0, num_examples)
    ambient = 0.5 * np.sin(np.pi * time) + rng.normal(0.0, 0.5, num_examples)
    y = amplitude * np.sin(np.pi * time + phase) + gain * ambient + rng.normal(0.0, 0.05, num_examples)
    return np.stack([time, ambient + bias], axis=1).astype(np.float32), y
