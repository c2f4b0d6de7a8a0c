"""Sums that nobody can read the summands of: secure aggregation, and encrypted sums where TenSEAL is there.

Clients upload 100,000 numbers. On the complete graph every two share a mask; on the ring each has as many neighbours as
`choose_graph` asks for if a twentieth is corrupt and a tenth drops out, and a tenth does. `dropped` is the most that
the complete graph recovers from at its threshold. CKKS runs on the host, on one core: what is timed is encrypting,
serialising, multiplying, adding and decrypting, for all clients together.

    python -m bench secure
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj
from bench.floor import Work
from bench.measure import Case, Workload
from cedarjax.privacy import homomorphic
from cedarjax.privacy import secure_aggregation as secure

NUM_PARAMS, MOST_SECONDS = 100_000, 60.0
CLIP, BITS, NUM_GROUPS = 8.0, 16, 10
MAX_CORRUPT, MAX_DROPPED = 0.05, 0.1
LEAST_CLIENTS = 20  # of whom fractions can be corrupt
HASH = 116  # operations of threefry: twenty rounds of five, five key injections, and the halves joined


def layouts(num_clients: int, dtype: Any) -> Sequence[Case]:
    """Integer sums alone, then whole aggregators, beside the mean that everybody can read."""
    rng = np.random.default_rng(0)
    integers = jnp.asarray(rng.integers(0, 2**BITS, size=(num_clients, NUM_PARAMS), dtype=np.uint32))
    updates = {"w": jnp.asarray(rng.normal(size=(num_clients, NUM_PARAMS)), dtype)}
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    key = jax.random.key(0)
    majority = num_clients // 2 + 1
    size = secure.GraphSize(num_clients - 1, majority)
    if num_clients >= LEAST_CLIENTS:
        size = secure.choose_graph(num_clients, max_corrupt=MAX_CORRUPT, max_dropped=MAX_DROPPED)
    everybody = jnp.ones(num_clients, bool)
    fewest = jnp.arange(num_clients) < majority
    most = jnp.arange(num_clients) < num_clients - int(MAX_DROPPED * num_clients)

    def work(num_neighbors: int) -> Work:
        masks = num_clients * (num_neighbors / 2 + 2)  # of pairs, of clients, and those again at the server
        return Work((HASH + 2.0) * masks * NUM_PARAMS, 4.0 * (num_clients + 1) * NUM_PARAMS)

    def integer_sum(survived: jax.Array, name: str, **graph: Any) -> Case:
        least = work(graph.get("num_neighbors", num_clients - 1))

        def run(values: jax.Array, survived: jax.Array, key: jax.Array) -> Any:
            return secure.secure_integer_sum(values, survived, key, **graph)

        return Case("one device", name, run, (integers, survived, key), num_clients, least)

    def aggregator(rule: cj.Aggregator, name: str, least: Work) -> Case:
        def run(updates: Any, weights: jax.Array, key: jax.Array) -> Any:
            return rule.update(updates, rule.init(params), params, weights=weights, key=key)

        return Case("one device", name, run, (updates, jnp.ones(num_clients), key), num_clients, least)

    plain = Work(2.0 * num_clients * NUM_PARAMS, 4.0 * (num_clients + 1) * NUM_PARAMS)
    ring = {"num_neighbors": size.num_neighbors, "threshold": size.threshold}
    cases = [
        aggregator(cj.robust.mean(), "mean in the clear", plain),
        integer_sum(everybody, f"complete graph, k = {num_clients - 1}"),
        integer_sum(fewest, f"complete graph, {num_clients - majority} dropped", threshold=majority),
        integer_sum(everybody, f"ring, k = {size.num_neighbors}", **ring),
        integer_sum(most, f"ring, {num_clients - int(most.sum())} dropped", **ring),
        aggregator(secure.secure_mean(CLIP, num_bits=BITS), "secure_mean, complete graph", work(num_clients - 1)),
    ]
    if num_clients >= 2 * NUM_GROUPS:
        rule = secure.group_wise(cj.robust.median(), NUM_GROUPS, CLIP, num_bits=BITS)
        cases.append(aggregator(rule, f"median of {NUM_GROUPS} groups", work(-(-num_clients // NUM_GROUPS) - 1)))
    if importlib.util.find_spec("tenseal") is not None:
        cases.append(encrypted(updates["w"].astype(jnp.float32), plain))
    return cases


def encrypted(rows: jax.Array, least: Work) -> Case:
    """CKKS, called back on the host: nothing in the callback is JAX's. The floor is that of the plain sum."""
    context = homomorphic.ckks_context()
    count, size = rows.shape

    def on_host(rows: Any) -> np.ndarray:
        told = homomorphic.encrypted_sum_of_rows(list(np.asarray(rows)), [1.0 / count] * count, context)
        return np.asarray(told.total, np.float32)

    def run(rows: jax.Array) -> jax.Array:
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((size,), jnp.float32), rows)

    return Case("host", "CKKS, degree 8,192", run, (rows,), count, least)


WORKLOAD = Workload(
    title=f"Secure aggregation of [C, {NUM_PARAMS:,}] updates",
    unit="client",
    num_clients=(100,),
    layouts=layouts,
    most_seconds=MOST_SECONDS,
)
