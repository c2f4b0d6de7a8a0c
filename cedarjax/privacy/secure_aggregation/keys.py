"""The clients' secrets, what they publish of them, and the keys of the masks that follow.

A client has a seed of its own, and a private key whose public half everybody knows. Two clients agree on a seed from
the private key of either and the public key of the other (Diffie and Hellman, `New Directions in Cryptography
<https://doi.org/10.1109/TIT.1976.1055638>`_, 1976), so that a server that is given the private key of a client that
dropped out can draw all masks which that client had with its neighbours, and no others.

This has the structure of the real thing and none of its strength: the group is that of 2^31 - 1, where a logarithm
takes a second, and a mask is drawn by a generator of simulations. Use it to learn what a protocol reveals, costs and
survives, never to protect anybody.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.privacy.secure_aggregation import field
from cedarjax.privacy.secure_aggregation.graph import Ring

NUM_LIMBS = 2
"""Numbers of 31 bits that make a seed."""
_GENERATOR = 7  # whose powers are all elements but 0


class Secrets(NamedTuple):
    """What only the client knows, place by place; each in limbs that are elements of the field."""

    seeds: jax.Array
    """`[C, NUM_LIMBS]` uint32, of the mask that a client shares with nobody."""
    private: jax.Array
    """`[C, NUM_LIMBS]` uint32, private keys, at least 1."""


def draw_secrets(clients: jax.Array, key: jax.Array) -> Secrets:
    """Fresh secrets for a round.

    Args:
      clients: `[C]` int32, the clients that are to have them; each draws from `fold_in(key, client)`.
      key: PRNG key.

    Returns:
      `Secrets`.
    """

    def of_client(client: jax.Array) -> Secrets:
        drawn = field.uniform(jax.random.fold_in(key, client), (2, NUM_LIMBS))
        return Secrets(drawn[0], jnp.maximum(drawn[1], 1))

    return jax.vmap(of_client)(clients)


def public_keys(private: jax.Array) -> jax.Array:
    """The public half of a private key.

    Args:
      private: `[C, NUM_LIMBS]` uint32.

    Returns:
      `[C, NUM_LIMBS]` uint32, `g^private`.
    """
    return field.power(jnp.full(private.shape, _GENERATOR, jnp.uint32), private)


def agree(private: jax.Array, public: jax.Array) -> jax.Array:
    """The seed of two clients, from the private key of one and the public key of the other.

    Args:
      private: `[..., NUM_LIMBS]` uint32.
      public: the same, of the other client.

    Returns:
      `[..., NUM_LIMBS]` uint32, the same from either side.

    Example:
      >>> import jax.numpy as jnp
      >>> private = jnp.array([[5, 6], [70, 80]], jnp.uint32)
      >>> public = public_keys(private)
      >>> bool((agree(private[0], public[1]) == agree(private[1], public[0])).all())
      True
    """
    return field.power(public, private)


def mask_key(nonce: jax.Array, one: jax.Array, other: jax.Array, seed: jax.Array) -> jax.Array:
    """The key of a mask.

    Args:
      nonce: PRNG key that everybody knows, another one each round.
      one: int32 scalar, place of a client.
      other: int32 scalar, place of the client that it shares the mask with, itself if nobody.
      seed: `[NUM_LIMBS]` uint32.

    Returns:
      PRNG key; the order of the two clients does not matter.
    """
    pair = jnp.stack([jnp.minimum(one, other), jnp.maximum(one, other)]).astype(jnp.uint32)
    return lax.scan(lambda key, word: (jax.random.fold_in(key, word), None), nonce, jnp.concatenate([pair, seed]))[0]


def mask_keys(ring: Ring, nonce: jax.Array, own: jax.Array, shared: jax.Array) -> jax.Array:
    """Keys of all masks of a round.

    Args:
      ring: who shares masks with whom.
      nonce: as in `mask_key`.
      own: `[C, NUM_LIMBS]` uint32, seeds of the masks that clients share with nobody.
      shared: `[H, C, NUM_LIMBS]` uint32, seeds of each place and the one `ring.offsets[h]` ahead.

    Returns:
      `[1 + H, C]` PRNG keys, the clients' own masks first.
    """
    places = jnp.arange(ring.num_clients, dtype=jnp.int32)
    others = jnp.concatenate([places[None], ring.ahead()])
    seeds = jnp.concatenate([own[None], shared])
    one_row = jax.vmap(lambda place, other, seed: mask_key(nonce, place, other, seed))
    return jax.vmap(lambda others, seeds: one_row(places, others, seeds))(others, seeds)
