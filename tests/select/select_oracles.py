"""What the tests of `cedarjax.select` share: draws over many keys, exact distributions, chi-square."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from cedarjax.core.dataset import ABSENT_ID


def everybody(num_clients):
    return jnp.ones(num_clients, bool)


def draw(selector, num_clients, num_draws, *, state=None, available=None, seed=0):
    """Selections and states of the same round under many keys, as numpy with a leading axis `[num_draws]`."""
    state = selector.init(num_clients) if state is None else state
    available = everybody(num_clients) if available is None else jnp.asarray(available)
    keys = jax.random.split(jax.random.key(seed), num_draws)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: selector.select(state, key, available)))(keys))


def sequential(weights, num_selected):
    """`{ordered tuple of ids: probability}` of successive sampling without replacement, by enumeration."""
    found = {}
    for order in itertools.permutations(range(len(weights)), num_selected):
        left, p = float(np.sum(weights)), 1.0
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        if p > 0:
            found[order] = p
    return found


def chi_square(outcomes, distribution):
    """p-value of the outcomes under `{outcome: probability}`; 0 if an impossible one is among them."""
    seen = Counter(outcomes)
    if set(seen) - set(distribution):
        return 0.0
    expected = np.array(list(distribution.values())) * sum(seen.values())
    assert expected.min() > 5  # otherwise chi-square is no approximation
    return stats.chisquare([seen[outcome] for outcome in distribution], expected).pvalue


def rows(client_id):
    return [tuple(row) for row in np.asarray(client_id).tolist()]


def present(selection):
    """Ids of one selection, empty places left out."""
    ids, weights = np.asarray(selection.client_id), np.asarray(selection.weights)
    assert (ids[weights == 0] == ABSENT_ID).all() and (weights >= 0).all()
    return ids[weights > 0].tolist()
