"""What is learned: real examples, dealt out to clients by a Dirichlet draw, and a small network as one flat vector."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from cedarjax import nn
from cedarjax.core import LossFn
from cedarjax.data import dirichlet_by_client
from experiments.datasets import NEW, TRAIN, sources
from experiments.datasets import load as load_federation
from experiments.datasets.federation import subsample


class Examples(NamedTuple):
    """Inputs and labels, on the host or on the device; the server holds the test set."""

    x: Any
    """`[n, d]` float32."""
    y: Any
    """`[n]` int32."""
    test_x: Any
    """`[m, d]` float32."""
    test_y: Any
    """`[m]` int32."""


class Setup(NamedTuple):
    """Hyper-parameters of a data set, set by hand for the mean with nobody attacking, and the same for every rule."""

    hidden: tuple[int, ...]
    """Widths of the network's blocks."""
    learning_rate: float
    """Of the clients' SGD."""
    batch_size: int
    """Examples per batch."""
    rounds: int
    """Rounds of training."""
    radius: float
    """Of centred clipping: about the length of an honest update halfway through training."""


class Runs(NamedTuple):
    """All runs that one program does, arrays `[R, ...]`; `R` runs over fractions, then alphas, then seeds."""

    rows: jax.Array
    """`[R, N, M]` int32, the examples of each client; those behind `counts` are padding."""
    counts: jax.Array
    """`[R, N]` int32."""
    byzantine: jax.Array
    """`[R, N]` bool, who attacks."""
    params: jax.Array
    """`[R, D]`, initial parameters."""
    keys: jax.Array
    """`[R]` keys of the runs."""


class Problem(NamedTuple):
    """A data set dealt out in several ways, and the network."""

    examples: Examples
    """The data, on the device."""
    num_classes: int
    """Classes, `K`."""
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    """`apply(params [D], x [B, d]) -> logits [B, K]`."""
    loss_fn: LossFn
    """Cross entropy."""
    runs: Callable[[Sequence[int]], Runs]
    """`runs(numbers of attackers) -> Runs`, for all alphas and seeds."""
    info: dict[str, Any]
    """What a report says of it."""


SETUPS: dict[str, Setup] = {
    "digits": Setup((32,), learning_rate=0.5, batch_size=10, rounds=30, radius=1.0),
    "mnist": Setup((32,), learning_rate=0.2, batch_size=20, rounds=30, radius=0.7),
    "wisdm": Setup((32,), learning_rate=0.1, batch_size=20, rounds=30, radius=0.5),
}
MOST_TRAIN, MOST_TEST = 4000, 2000


def read_examples(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> Examples:
    """Reads a data set, always divided into the same training and test examples.

    - `digits`: a quarter of scikit-learn's images is the test set.
    - `mnist`: 4000 of the original training images, 2000 of the original test images.
    - `wisdm`: amplitude spectra of at most 4000 windows of 34 wearers and 2000 of 11 others.

    Args:
      dataset: a key of `SETUPS`.
      data_dir: folder of the sets that are not embedded, see `experiments.datasets.sources`.

    Returns:
      The `Examples`.

    Raises:
      ValueError: for an unknown name.
      DatasetNotFoundError: when the files are absent.
      DataError: when a file does not hold what it should.
    """
    rng, scale = np.random.default_rng(0), 1
    if dataset == "digits":
        x, y = load_digits(return_X_y=True)
        order = rng.permutation(len(y))
        train, test = order[: len(y) * 3 // 4], order[len(y) * 3 // 4 :]
        scale = 16
    elif dataset == "mnist":
        path = sources.find("mnist", data_dir)
        source = sources.read(path, ("x", "y", "from_t10k"))
        sources.check_lengths(path, source, ("x", "y", "from_t10k"))
        sources.check_shape(path, "x", source["x"], (None, 28, 28))
        sources.check_range(path, "y", source["y"], 0, 9)
        train = subsample(rng, np.flatnonzero(~source["from_t10k"]), MOST_TRAIN)
        test = subsample(rng, np.flatnonzero(source["from_t10k"]), MOST_TEST)
        x, y, scale = source["x"], source["y"], 255
    elif dataset == "wisdm":
        federation = load_federation("wisdm", data_dir=data_dir)
        role = federation.role[federation.client_id]
        train = subsample(rng, np.flatnonzero(role == TRAIN), MOST_TRAIN)
        test = subsample(rng, np.flatnonzero(role == NEW), MOST_TEST)
        # Where in a window a movement begins says nothing: amplitudes of its frequencies, not its course.
        x, y = np.log1p(np.abs(np.fft.rfft(federation.x, axis=1))) - 2, federation.y
    else:
        raise ValueError(f"dataset must be one of {', '.join(SETUPS)}, got {dataset!r}.")

    def part(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[rows].reshape(len(rows), -1).astype(np.float32) / scale, y[rows].astype(np.int32)

    return Examples(*part(train), *part(test))


def make_problem(
    examples: Examples, hidden: Sequence[int], *, num_clients: int, alphas: Sequence[float], num_seeds: int
) -> Problem:
    """Deals the examples out for every alpha and seed.

    Every client draws its mixture of classes from a Dirichlet with `alpha` for each class and gets as many examples as
    the others. A seed draws the partition, who attacks, the initial parameters and the batches; attackers of a small
    fraction are among those of a larger one, and all rules and attacks see the same draws.

    Args:
      examples: the data.
      hidden: widths of the network's blocks.
      num_clients: clients, `N`.
      alphas: concentrations per class, above 0.
      num_seeds: seeds.

    Returns:
      The `Problem`.

    Raises:
      ValueError: if there are fewer examples than clients, or an alpha is out of range.
    """
    num_classes = int(max(examples.y.max(), examples.test_y.max())) + 1
    num_inputs = examples.x.shape[1]
    model = nn.functional(lambda rngs: nn.MLP(num_inputs, tuple(hidden), num_classes, rngs=rngs))
    # One leaf in place of four: programs of rules and attacks get several times smaller.
    unravel = ravel_pytree(model.init(jax.random.key(0)))[1]

    def apply(params: jax.Array, x: jax.Array) -> jax.Array:
        return model.apply(unravel(params), x)

    width = -(-len(examples.y) // num_clients)
    rows = np.zeros((len(alphas), num_seeds, num_clients, width), np.int32)
    counts = np.zeros(rows.shape[:-1], np.int32)
    for a, alpha in enumerate(alphas):
        for seed in range(num_seeds):
            parts = dirichlet_by_client(examples.y, num_clients, alpha=alpha * num_classes, seed=seed)
            for client, part in enumerate(parts):
                rows[a, seed, client, : len(part)], counts[a, seed, client] = part, len(part)
    ranks = np.stack([np.random.default_rng((seed, 1)).permutation(num_clients) for seed in range(num_seeds)])
    params = jnp.stack([ravel_pytree(model.init(jax.random.key(seed)))[0] for seed in range(num_seeds)])
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for seed in range(num_seeds)])

    def runs(numbers: Sequence[int]) -> Runs:
        cells = [(f, a, s) for f in numbers for a in range(len(alphas)) for s in range(num_seeds)]
        number, alpha, seed = (np.array(column) for column in zip(*cells, strict=True))
        return Runs(
            jnp.asarray(rows[alpha, seed]),
            jnp.asarray(counts[alpha, seed]),
            jnp.asarray(ranks[seed] < number[:, None]),
            params[seed],
            keys[seed],
        )

    info = {
        "examples": len(examples.y),
        "test examples": len(examples.test_y),
        "classes": num_classes,
        "parameters": int(params.shape[1]),
        "examples per client": [int(counts.min()), int(counts.max())],
        "classes per client": {
            f"alpha {alpha:g}": round(float(np.mean(_num_classes(examples.y, rows[a], counts[a]))), 1)
            for a, alpha in enumerate(alphas)
        },
    }
    device = Examples(*map(jnp.asarray, examples))
    return Problem(device, num_classes, apply, nn.cross_entropy(apply), runs, info)


def _num_classes(y: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> list[int]:
    """Different labels of every client of every seed."""
    clients = zip(rows.reshape(-1, rows.shape[-1]), counts.ravel(), strict=True)
    return [len(np.unique(y[own[:count]])) for own, count in clients]
