"""Quantisers against recorded results of fedjax: the same values, and as often."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import compress

with np.load(Path(__file__).parent / "goldens/fedjax.npz") as file:
    GOLDENS = dict(file)
NUM_KEYS = int(GOLDENS["num_keys"])
CASES = ["normal", "tail", "offset", "flat"]
OURS = {
    "binary": lambda: compress.uniform_quantize(1),
    "uniform_4": lambda: compress.uniform_quantize(2),  # they count levels, we count bits
    "uniform_16": lambda: compress.uniform_quantize(4),
    "terngrad": lambda: compress.terngrad(clip=2.5),  # which they always do
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OURS)
def test_values_and_frequencies_are_those_of_fedjax(name, case):
    vector = jnp.asarray(GOLDENS[f"{case}/vector"])
    compressor = OURS[name]()
    keys = jax.random.split(jax.random.key(12), NUM_KEYS)
    run = jax.jit(jax.vmap(lambda k: compressor.decompress(compressor.compress(vector, (), k)[0])))
    results = np.asarray(run(keys))
    values, counts = GOLDENS[f"{case}/{name}/values"], GOLDENS[f"{case}/{name}/counts"]
    scale = np.abs(GOLDENS[f"{case}/vector"]).max()
    most = 0
    for column, ours in enumerate(results.T):
        theirs = values[:, column][~np.isnan(values[:, column])]
        nearest = np.abs(ours[:, None] - theirs[None])
        assert nearest.min(1).max() <= 2e-6 * scale, "a value that fedjax does not have"
        often = np.bincount(nearest.argmin(1), minlength=len(theirs))
        # Two shares of the same coin: within 5.5 standard errors, which all keep but once in 10^5 runs.
        share = (often + counts[: len(theirs), column]) / (2 * NUM_KEYS)
        error = np.sqrt(2 * share * (1 - share) / NUM_KEYS)
        assert (np.abs(often - counts[: len(theirs), column]) / NUM_KEYS <= 5.5 * error + 1e-9).all()
        most = max(most, len(theirs))
    assert most >= 2 or case == "flat" or (name, case) == ("terngrad", "offset")  # all of which is clipped
