"""Meta-gradients of MAML by torch.autograd in float64, for an MLP and a CNN.

Writes `maml_torch.npz` beside itself. Run it as `python make_maml_torch.py` where numpy and torch 2 are installed.

Names in the file: `<model>/x`, `<model>/y` (support rows first), `<model>/params/<name>` and
`<model>/<order>/<steps>/<name>`, the gradient of the query loss after so many inner steps of SGD. Kernels are
`[in, out]` and `[height, width, in, out]`, images `[rows, height, width, channels]`.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

NUM_SUPPORT, NUM_QUERY, NUM_CLASSES, RATE = 5, 5, 3, 0.3
SHAPES = {
    "mlp": {"w1": (12, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)},
    "cnn": {"k1": (3, 3, 1, 4), "b1": (4,), "k2": (3, 3, 4, 4), "b2": (4,), "w": (64, 3), "b": (3,)},
}
INPUTS = {"mlp": (12,), "cnn": (8, 8, 1)}


def mlp(params, x):
    return torch.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def cnn(params, x):
    x = x.permute(0, 3, 1, 2)
    x = functional.conv2d(x, params["k1"].permute(3, 2, 0, 1), params["b1"], padding=1)
    x = functional.max_pool2d(torch.relu(x), 2)
    x = torch.relu(functional.conv2d(x, params["k2"].permute(3, 2, 0, 1), params["b2"], padding=1))
    return x.permute(0, 2, 3, 1).flatten(1) @ params["w"] + params["b"]


def meta_gradient(model, params, x, y, num_steps, second_order):
    start = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    x, y = torch.tensor(x), torch.tensor(y)
    adapted = start
    for _ in range(num_steps):
        loss = functional.cross_entropy(model(adapted, x[:NUM_SUPPORT]), y[:NUM_SUPPORT])
        grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=second_order)
        adapted = {name: p - RATE * g for (name, p), g in zip(adapted.items(), grads, strict=True)}
    loss = functional.cross_entropy(model(adapted, x[NUM_SUPPORT:]), y[NUM_SUPPORT:])
    return dict(zip(params, torch.autograd.grad(loss, list(start.values())), strict=True))


def main():
    rng, arrays = np.random.default_rng(0), {}
    for name, model in {"mlp": mlp, "cnn": cnn}.items():
        x = rng.normal(size=(NUM_SUPPORT + NUM_QUERY, *INPUTS[name]))
        y = rng.integers(0, NUM_CLASSES, size=NUM_SUPPORT + NUM_QUERY)
        params = {key: rng.normal(size=s) / np.sqrt(max(np.prod(s[:-1]), 4)) for key, s in SHAPES[name].items()}
        arrays |= {f"{name}/x": x, f"{name}/y": y} | {f"{name}/params/{key}": p for key, p in params.items()}
        for order in ("first", "second"):
            for num_steps in (1, 3):
                grads = meta_gradient(model, params, x, y, num_steps, order == "second")
                arrays |= {f"{name}/{order}/{num_steps}/{key}": g.numpy() for key, g in grads.items()}
    np.savez_compressed(Path(__file__).parent / "maml_torch.npz", rate=RATE, num_support=NUM_SUPPORT, **arrays)


if __name__ == "__main__":
    main()
