"""What fedjax 0.0.17 makes of fixed vectors: possible values and how often they come, or means and variances.

Writes `fedjax.npz` beside itself. Run it as `python make_fedjax.py` where `bench/peers/fedjax.txt` is installed.

Names in the file, `<case>` among those of `VECTORS`:

- `<case>/vector`: `[d]` float32, the input;
- `<case>/<quantiser>/values`: `[most, d]` float32, the distinct values of every coordinate over all keys, rising, and
  NaN where there are fewer; `<case>/<quantiser>/counts`: `[most, d]` int32, how often each came among `num_keys`; for
  `binary`, `uniform_4` and `uniform_16` (levels), `terngrad`;
- `<case>/<rotated>/mean`, `/variance`: `[d]` float64, of every coordinate over `num_keys` keys;
  `<case>/<rotated>/errors`: `[num_keys]` float32, `|Q(v) - v|^2 / |v|^2` of each; `<case>/<rotated>/samples`:
  `[100, d]` float32, the results of the first keys; for `rotated_uniform_4`, `rotated_uniform_16` and `drive`, rotated
  by random signs and a Walsh-Hadamard matrix of the next power of two.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fedjax.aggregators import compression, walsh_hadamard

NUM_KEYS, NUM_SAMPLES, MOST = 4096, 100, 3
RNG = np.random.default_rng(0)
VECTORS = {
    "normal": RNG.normal(size=16),
    "tail": RNG.standard_cauchy(size=24),
    "offset": 10.0 + RNG.uniform(size=12),
    "flat": np.full(7, 0.25),
}
ROTATED = ("normal", "tail", "offset")


def rotated(vector, key, quantise):
    """Rotates, quantises, rotates back, as fedjax's aggregators do."""
    turned, shape = walsh_hadamard.structured_rotation(vector, key)
    return inverse(quantise(turned), key, vector.shape[0])


def inverse(turned, key, size):
    """fedjax's `inverse_structured_rotation`, with a static shape so that it maps over keys."""
    signs = jax.random.rademacher(key, turned.shape)
    return (walsh_hadamard.walsh_hadamard_transform(turned) * signs / jnp.sqrt(turned.shape[0]))[:size]


def drive(vector, key):
    return rotated(vector, key, compression.drive_pytree)


def rotated_uniform(num_levels):
    def quantise(vector, key):
        rotation_key, key = jax.random.split(key)
        return rotated(
            vector, rotation_key, lambda turned: compression.uniform_stochastic_quantize(turned, num_levels, key)
        )

    return quantise


def uniform(num_levels):
    return lambda vector, key: compression.uniform_stochastic_quantize(vector, num_levels, key)


def frequencies(results):
    """Distinct values of each column and how often they come."""
    size = results.shape[1]
    values, counts = np.full((MOST, size), np.nan, np.float32), np.zeros((MOST, size), np.int32)
    for column in range(size):
        found, often = np.unique(results[:, column], return_counts=True)
        values[: len(found), column], counts[: len(found), column] = found, often
    return values, counts


def main():
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    arrays = {"num_keys": NUM_KEYS}
    for case, vector in VECTORS.items():
        vector = jnp.asarray(vector, jnp.float32)
        arrays[f"{case}/vector"] = np.asarray(vector)
        plain = {
            "binary": compression.binary_stochastic_quantize,
            "uniform_4": uniform(4),
            "uniform_16": uniform(16),
            "terngrad": compression.terngrad_quantize,
        }
        for name, quantise in plain.items():
            results = np.asarray(jax.jit(jax.vmap(quantise, (None, 0)))(vector, keys))
            arrays[f"{case}/{name}/values"], arrays[f"{case}/{name}/counts"] = frequencies(results)
        if case not in ROTATED:
            continue
        turned = {"rotated_uniform_4": rotated_uniform(4), "rotated_uniform_16": rotated_uniform(16), "drive": drive}
        for name, quantise in turned.items():
            results = np.asarray(jax.jit(jax.vmap(quantise, (None, 0)))(vector, keys), np.float64)
            errors = ((results - np.asarray(vector)) ** 2).sum(1) / float((vector**2).sum())
            arrays[f"{case}/{name}/mean"] = results.mean(0)
            arrays[f"{case}/{name}/variance"] = results.var(0, ddof=1)
            arrays[f"{case}/{name}/errors"] = errors.astype(np.float32)
            arrays[f"{case}/{name}/samples"] = results[:NUM_SAMPLES].astype(np.float32)
    check_inverse(keys[0])
    np.savez_compressed(Path(__file__).parent / "fedjax.npz", **arrays)


def check_inverse(key):
    """The inverse above is fedjax's own."""
    vector = jnp.asarray(VECTORS["tail"], jnp.float32)
    turned, shape = walsh_hadamard.structured_rotation(vector, key)
    theirs = walsh_hadamard.inverse_structured_rotation(turned, key, shape)
    np.testing.assert_array_equal(np.asarray(theirs).reshape(-1), np.asarray(inverse(turned, key, vector.shape[0])))


if __name__ == "__main__":
    main()
