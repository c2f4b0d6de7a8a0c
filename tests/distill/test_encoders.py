import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.distill import build_relations, embed, random_features, self_trained_encoder


@pytest.mark.parametrize("kind", ["relu", "cos"])
def test_features_are_those_of_the_kernel(kind):
    """Inner products approach the arc-cosine and the Gaussian kernel."""
    x = np.random.default_rng(0).normal(size=(5, 4, 2))
    encoder = random_features(jax.random.key(0), (4, 2), 20_000, kind=kind, scale=1.5)
    features = np.asarray(encoder(jnp.asarray(x, jnp.float32)), float)
    flat = 1.5 * x.reshape(5, -1) / np.sqrt(8)
    if kind == "cos":
        want = np.exp(-((flat[:, None] - flat[None]) ** 2).sum(axis=2) / 2)
        got = features @ features.T
    else:
        norms = np.linalg.norm(flat, axis=1)
        angle = np.arccos(np.clip(flat @ flat.T / np.outer(norms, norms), -1, 1))
        want = np.outer(norms, norms) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        got = features @ features.T / 20_000
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


def test_equal_keys_give_equal_features():
    x = jnp.ones((2, 3))
    one, same, other = (random_features(jax.random.key(seed), (3,), 4)(x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert random_features(jax.random.key(0), (3,), 4)(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("block_size", [1, 3, 7, 100])
def test_blocks_change_nothing(block_size):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)), jnp.float32)
    encoder = random_features(jax.random.key(0), (3,), 5)
    np.testing.assert_allclose(embed(encoder, x, block_size=block_size), encoder(x), rtol=1e-6)


def test_a_trained_encoder_brings_samples_of_a_kind_together():
    """Only the second input tells the kinds apart; the first one is loud."""
    rng = np.random.default_rng(2)
    kind = rng.integers(0, 2, 64)
    x = np.stack([3 * rng.normal(size=64), 2.0 * kind - 1], axis=1).astype(np.float32)
    features_fn = lambda w, x: jnp.tanh(x @ w["body"])  # noqa: E731
    loss_fn = cj.nn.cross_entropy(lambda w, x: features_fn(w, x) @ w["head"])
    params = {"body": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32), "head": jnp.zeros((4, 2))}
    examples = {"x": jnp.asarray(x), "y": jnp.asarray(kind)}
    train = lambda n: self_trained_encoder(  # noqa: E731
        loss_fn, features_fn, optax.sgd(0.3), params, examples, jax.random.key(0), batch_size=8, num_epochs=n
    )

    def agreement(encoder):
        relations = build_relations(embed(encoder, examples["x"]), jnp.zeros(64, jnp.int32), 4)
        return (kind[np.asarray(relations.index)] == kind[:, None]).mean()

    assert agreement(train(30)) > max(agreement(lambda x: features_fn(params, x)), 0.95)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_features(jax.random.key(0), (3,), 0), "num_features must be at least 1, got 0"),
        (lambda: random_features(jax.random.key(0), (3,), 1, kind="tanh"), r"kind must be one of .* got 'tanh'"),
        (lambda: random_features(jax.random.key(0), (3,), 1, scale=0.0), "scale must be above 0, got 0.0"),
        (
            lambda: random_features(jax.random.key(0), (3,), 1)(jnp.ones((2, 4))),
            r"x must be \[B, \*shape\] with shape \(3,\), got the shape \(2, 4\)",
        ),
        (lambda: embed(lambda x: x, jnp.ones((2, 3)), block_size=0), "block_size must be at least 1, got 0"),
        (lambda: embed(lambda x: x[:, 0], jnp.ones((2, 3))), r"encoder must return \[B, d\], got the shape \(2,\)"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
