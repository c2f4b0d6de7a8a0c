"""A round of secure aggregation: set up, masked uploads, recovery of what dropped out, the sum.

Reference: Bonawitz et al., `Practical Secure Aggregation for Federated Learning on User-Held Data
<https://eprint.iacr.org/2017/281>`_, 2017, on the graph of Bell et al. (see `graph`).

This is a simulation of the protocol between honest parties, for what it computes, costs and survives. It makes no
cryptographic claim: see `keys`. Signatures, encrypted channels and the consistency check among clients are left out.
What each party knows is kept apart all the same: the server's functions read the nonce, the public keys, the masked
uploads and the shares that were sent to it, never a client's secrets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.privacy.secure_aggregation import keys, masks, shamir
from cedarjax.privacy.secure_aggregation.graph import Ring
from cedarjax.privacy.secure_aggregation.keys import NUM_LIMBS, Secrets
from cedarjax.privacy.secure_aggregation.masks import Removal


class Setup(NamedTuple):
    """What stands before the uploads, place by place."""

    nonce: jax.Array
    """PRNG key of the round, known to all."""
    order: jax.Array
    """`[C]` int32, the client at each place, known to all."""
    public: jax.Array
    """`[C, NUM_LIMBS]` uint32 public keys, known to all."""
    shares: jax.Array
    """`[C, k + 1, 2, NUM_LIMBS]` uint32: of each place's seed and of its private key, held by `ring.holders()`."""
    secrets: Secrets
    """What each client keeps to itself."""


class Recovery(NamedTuple):
    """What the server learns from the shares that it asked for."""

    removal: Removal
    """Masks that are left in the sum."""
    ok: jax.Array
    """bool scalar: whether every secret that is needed had enough shares, and anybody survived."""


def check_threshold(ring: Ring, threshold: int | None) -> int:
    """The number of shares that tell a secret.

    Args:
      ring: who shares masks with whom.
      threshold: `t`; `None` for a majority of the holders.

    Returns:
      `t`.

    Raises:
      ValueError: if it is not from 2 to the number of holders, `k + 1`.
    """
    num_holders = ring.num_neighbors + 1
    threshold = max(2, num_holders // 2 + 1) if threshold is None else threshold
    if not 2 <= threshold <= num_holders:
        raise ValueError(
            f"threshold must be from 2 to the clients that hold shares, num_neighbors + 1 = {num_holders}, "
            f"got {threshold}."
        )
    return threshold


def setup_round(ring: Ring, threshold: int, key: jax.Array) -> Setup:
    """Seats the clients, draws their secrets, and deals shares of them.

    Args:
      ring: who shares masks with whom.
      threshold: `t`, shares that tell a secret.
      key: PRNG key of the round, never used for another.

    Returns:
      A `Setup`.
    """
    order_key, nonce, secret_key, share_key = jax.random.split(key, 4)
    order = ring.order(order_key)
    secrets = keys.draw_secrets(order, secret_key)
    kept = jnp.concatenate([secrets.seeds, secrets.private], axis=1)
    points = ring.holders().astype(jnp.uint32) + 1

    def deal(client: jax.Array, kept: jax.Array, points: jax.Array) -> jax.Array:
        return shamir.split_secret(kept, points, threshold, jax.random.fold_in(share_key, client))

    shares = jax.vmap(deal)(order, kept, points)
    shares = shares.reshape(ring.num_clients, ring.num_neighbors + 1, 2, NUM_LIMBS)
    return Setup(nonce, order, keys.public_keys(secrets.private), shares, secrets)


def client_keys(ring: Ring, setup: Setup) -> jax.Array:
    """Keys of the masks as the clients have them.

    Args:
      ring: who shares masks with whom.
      setup: from `setup_round`.

    Returns:
      `[1 + H, C]` PRNG keys.
    """
    seeds = keys.agree(
        jnp.broadcast_to(setup.secrets.private, (len(ring.offsets), *setup.public.shape)), setup.public[ring.ahead()]
    )
    return keys.mask_keys(ring, setup.nonce, setup.secrets.seeds, seeds)


def mask_uploads(ring: Ring, values: jax.Array, setup: Setup) -> jax.Array:
    """What the clients send.

    Args:
      ring: who shares masks with whom.
      values: `[C, D]` uint32, a row for each client.
      setup: from `setup_round`.

    Returns:
      `[C, D]` uint32, row by row the client's masked numbers, which alone are uniform.
    """
    sent = masks.mask_block(ring, values[setup.order], client_keys(ring, setup), jnp.zeros((), jnp.int32))
    return jnp.zeros_like(sent).at[setup.order].set(sent)


def recover(
    ring: Ring, threshold: int, setup: Setup, survived: jax.Array, answered: jax.Array | None = None
) -> Recovery:
    """The server asks survivors for shares: of the seeds of who survived, and of the private keys of who did not.

    It never asks for both of one client, which would bare what that client sent. A client that dropped out is of no
    interest if none of its neighbours survived.

    Args:
      ring: who shares masks with whom.
      threshold: `t`.
      setup: from `setup_round`; its secrets are not read.
      survived: `[C]` bool, clients whose masked upload came.
      answered: `[C]` bool, survivors that also answered now; default: all of them.

    Returns:
      A `Recovery`; whoever answers without having uploaded is not heard.
    """
    survived = survived[setup.order]
    answered = survived if answered is None else answered[setup.order] & survived
    holders = ring.holders()
    here = answered[holders]
    points = holders.astype(jnp.uint32) + 1
    asked = jnp.where(survived[:, None, None], setup.shares[:, :, 0], setup.shares[:, :, 1])
    secrets = jax.vmap(lambda s, p, a: shamir.reconstruct_secret(s, p, a, threshold))(asked, points, here)
    needed = survived | survived[holders].any(axis=1)
    ok = survived.any() & (~needed | (here.sum(axis=1, dtype=jnp.int32) >= threshold)).all()

    ahead = ring.ahead()
    gone = ~survived[None, :, None]
    # Of a pair of which one dropped out, the private key of that one and the public key of the other.
    seeds = keys.agree(
        jnp.where(gone, secrets[None], secrets[ahead]), jnp.where(gone, setup.public[ahead], setup.public[None])
    )
    return Recovery(masks.plan_removal(ring, survived, keys.mask_keys(ring, setup.nonce, secrets, seeds)), ok)


def unmask(uploads: jax.Array, survived: jax.Array, recovery: Recovery) -> jax.Array:
    """The sum over survivors of what they sent, less the masks that are left in it.

    Args:
      uploads: `[C, D]` uint32 from `mask_uploads`; rows of clients that dropped out are not read.
      survived: `[C]` bool, as given to `recover`.
      recovery: from `recover`.

    Returns:
      `[D]` uint32, the sum of the survivors' numbers modulo 2^32 if `recovery.ok`, otherwise 0.
    """
    total = masks.add_rows(jnp.where(survived[:, None], uploads, 0))
    left = masks.removal_block(recovery.removal, jnp.zeros((), jnp.int32), uploads.shape[1])
    return jnp.where(recovery.ok, total - left, 0)
