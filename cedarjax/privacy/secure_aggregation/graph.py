"""Who shares a mask with whom: every two clients, or the neighbours on a shuffled ring.

Reference: Bell et al., `Secure Single-Server Aggregation with (Poly)Logarithmic Overhead
<https://eprint.iacr.org/2020/704>`_, 2020. Clients sit around a ring in random order and share masks with the `k / 2`
next on either side, so that a round costs `k` masks a client in place of `C - 1`. With `k = C - 1` it is the complete
graph of Bonawitz et al. There shares are held by neighbours alone; here a client also holds a share of its own secrets,
which makes the complete graph the one of Bonawitz et al., where every client holds one.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Ring:
    """Places `0 .. num_clients - 1` around a ring, each the neighbour of the nearest `num_neighbors` others."""

    num_clients: int
    """`C`, at least 2."""
    num_neighbors: int
    """`k`, from 1 to `C - 1`; odd only if `C` is even, for the place across the ring is then one's own neighbour."""

    def __post_init__(self) -> None:
        if self.num_clients < 2:
            raise ValueError(f"num_clients must be at least 2 for a secure sum, got {self.num_clients}.")
        if not 1 <= self.num_neighbors < self.num_clients:
            raise ValueError(
                f"num_neighbors must satisfy 1 <= num_neighbors < num_clients, "
                f"got {self.num_neighbors} and {self.num_clients}."
            )
        if self.num_neighbors % 2 and self.num_clients % 2:
            raise ValueError(
                f"num_neighbors must be even if num_clients is odd, got {self.num_neighbors} and {self.num_clients}."
            )

    @property
    def is_complete(self) -> bool:
        """Whether every two clients are neighbours."""
        return self.num_neighbors == self.num_clients - 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """How far ahead the neighbours ahead are, the one across the ring last."""
        near = tuple(range(1, self.num_neighbors // 2 + 1))
        return (*near, self.num_clients // 2) if self.num_neighbors % 2 else near

    @property
    def num_pairs(self) -> int:
        """Pairs of neighbours, `C k / 2`."""
        return self.num_clients * self.num_neighbors // 2

    def ahead(self) -> jax.Array:
        """`[H, C]` int32: for each offset, the place that many ahead of each place."""
        places = jnp.arange(self.num_clients, dtype=jnp.int32)
        steps = jnp.array(self.offsets, jnp.int32)
        return (places[None] + steps[:, None]) % self.num_clients

    def signs(self) -> jax.Array:
        """`[H, C]` int32: 1 where the place is the lower of the pair, -1 where it is the higher, 0 if counted twice."""
        places = jnp.arange(self.num_clients, dtype=jnp.int32)[None]
        signs = jnp.where(places < self.ahead(), 1, -1)
        if self.num_neighbors % 2:  # both ends of a pair across the ring meet the other at the same offset
            signs = signs.at[-1, self.num_clients // 2 :].set(0)
        return signs.astype(jnp.int32)

    def holders(self) -> jax.Array:
        """`[C, k + 1]` int32: who holds shares of each place's secrets, itself first and then its neighbours."""
        places = jnp.arange(self.num_clients, dtype=jnp.int32)
        half = self.num_neighbors // 2
        steps = [0, *range(1, half + 1), *range(-half, 0), *([self.num_clients // 2] if self.num_neighbors % 2 else [])]
        return (places[:, None] + jnp.array(steps, jnp.int32)[None]) % self.num_clients

    def order(self, key: jax.Array) -> jax.Array:
        """Which client sits at each place.

        Args:
          key: randomness; not used by the complete graph, where places mean nothing.

        Returns:
          `[C]` int32.
        """
        places = jnp.arange(self.num_clients, dtype=jnp.int32)
        return places if self.is_complete else jax.random.permutation(key, places)


class GraphSize(NamedTuple):
    """A graph that is safe enough."""

    num_neighbors: int
    """`k`."""
    threshold: int
    """Shares that tell a secret, `t`."""


def choose_graph(
    num_clients: int,
    *,
    max_corrupt: float,
    max_dropped: float,
    security_bits: int = 40,
    failure_bits: int = 20,
) -> GraphSize:
    """The smallest number of neighbours, and its threshold, for given shares of corrupt and of dropped clients.

    Neighbours are drawn without replacement, so how many of them are corrupt, or survive, is hypergeometric. Chosen is
    the least `k` for which some `t` makes, each summed over all clients,

    - `P(t or more neighbours are corrupt)`, when a secret is betrayed, at most `2^-security_bits`;
    - `(max_corrupt + max_dropped)^(k / 2)`, which bounds a cut of the ring of honest survivors on one side of a client,
      at most `2^-security_bits`;
    - `P(fewer than t neighbours survive)`, when the round is refused, at most `2^-failure_bits`.

    `k` grows with the logarithm of `C`, so what is half of all clients where there are a hundred is a hundredth where
    there are ten thousand. The adversary is curious but follows the protocol, and corrupts before the ring is shuffled.

    Args:
      num_clients: `C`, at least 2.
      max_corrupt: share of clients that tell the server what they hold, in [0, 1).
      max_dropped: share of clients that drop out of a round, in [0, 1), with `max_corrupt + max_dropped < 1`.
      security_bits: minus log2 of the chance that a client's privacy fails.
      failure_bits: minus log2 of the chance that a round fails though no more than `max_dropped` drop out.

    Returns:
      A `GraphSize`; the complete graph if nothing smaller will do.

    Raises:
      ValueError: if an argument is out of range, or even the complete graph will not do.

    Example:
      >>> choose_graph(100, max_corrupt=0.33, max_dropped=0.33)
      GraphSize(num_neighbors=99, threshold=34)
      >>> choose_graph(10_000, max_corrupt=0.05, max_dropped=0.1)
      GraphSize(num_neighbors=42, threshold=21)
    """
    if num_clients < 2:
        raise ValueError(f"num_clients must be at least 2 for a secure sum, got {num_clients}.")
    if not (0 <= max_corrupt < 1 and 0 <= max_dropped < 1 and max_corrupt + max_dropped < 1):
        raise ValueError(
            f"max_corrupt and max_dropped must be in [0, 1) and add up to less than 1, "
            f"got {max_corrupt} and {max_dropped}."
        )
    if security_bits < 1 or failure_bits < 1:
        raise ValueError(f"security_bits and failure_bits must be at least 1, got {security_bits} and {failure_bits}.")
    others = num_clients - 1
    corrupt, dropped = (math.ceil(share * num_clients - 1e-9) for share in (max_corrupt, max_dropped))
    share = max_corrupt + max_dropped
    for k in range(2, others, 2):
        if share > 0 and math.log2(num_clients) + k / 2 * math.log2(share) > -security_bits:
            continue
        t = _least_safe(num_clients, others, min(corrupt, others), k, security_bits)
        failing = sum(
            math.comb(max(others - dropped, 0), s) * math.comb(min(dropped, others), k - s)
            for s in range(min(t, k + 1))
        )
        if t <= k and (num_clients * failing) << failure_bits <= math.comb(others, k):
            return GraphSize(k, max(2, t))
    threshold = max(2, corrupt + 1)
    if threshold > num_clients - dropped:
        raise ValueError(
            f"max_corrupt and max_dropped must leave more survivors than corrupt clients, "
            f"got {corrupt} corrupt and {dropped} dropped of {num_clients}."
        )
    return GraphSize(others, threshold)


def _least_safe(num_clients: int, others: int, corrupt: int, k: int, security_bits: int) -> int:
    """The least threshold that corrupt neighbours reach with a chance of at most `2^-security_bits`."""
    reaching, t, ways = 0, k + 1, math.comb(others, k)
    while t > 0:
        reaching += math.comb(corrupt, t - 1) * math.comb(others - corrupt, k - t + 1)
        if (num_clients * reaching) << security_bits > ways:
            return t
        t -= 1
    return max(t, 1)
