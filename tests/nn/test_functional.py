import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cedarjax.core.names import leaf_names
from cedarjax.nn import MLP, functional


class Stack(nnx.Module):
    """A module that holds its layers in a list, and has no features."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def test_gives_what_the_module_gives():
    module = MLP(4, (8, 8), 3, rngs=nnx.Rngs(jax.random.key(7)))
    model = functional(lambda rngs: MLP(4, (8, 8), 3, rngs=rngs))
    params = model.init(jax.random.key(7))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    np.testing.assert_array_equal(model.apply(params, x), module(x))
    jax.tree.map(np.testing.assert_array_equal, model.features(params, x), module.features(x))


def test_params_are_plain_dicts_with_string_keys():
    params = functional(Stack).init(jax.random.key(0))
    assert type(params) is dict and type(params["layers"]["0"]) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert leaf_names(params) == ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]


def test_init_depends_on_the_key_alone():
    init = functional(Stack).init
    a, b, c = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["layers"]["0"]["kernel"], c["layers"]["0"]["kernel"])
    kernels = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 3))["layers"]["0"]["kernel"]
    assert kernels.shape == (3, 3, 4) and len(np.unique(kernels[:, 0, 0])) == 3


def test_one_set_of_params_per_client():
    model = functional(Stack)
    params = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (3, 5, 3))
    together = jax.jit(jax.vmap(model.apply))(params, x)
    for client in range(3):
        alone = model.apply(jax.tree.map(lambda leaf: leaf[client], params), x[client])  # noqa: B023
        np.testing.assert_allclose(together[client], alone, rtol=1e-5, atol=1e-6)


def test_second_derivatives_agree_with_finite_differences(x64):
    model = functional(Stack)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (5, 3), jnp.float64)
    direction = jax.tree.map(jnp.ones_like, params)
    grad = jax.grad(lambda params: jnp.square(model.apply(params, x)).sum())
    exact = jax.jvp(grad, (params,), (direction,))[1]
    step = 1e-5
    ahead, behind = (grad(jax.tree.map(lambda leaf: leaf + sign * step, params)) for sign in (1, -1))  # noqa: B023
    numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), exact, numeric)


def test_compiles_to_the_program_written_by_hand():
    model = functional(Stack)
    params = model.init(jax.random.key(0))

    def by_hand(params, x):
        hidden = x
        for place in ("0", "1"):
            layer = params["layers"][place]
            out = jax.lax.dot_general(hidden, layer["kernel"], (((1,), (0,)), ((), ())))
            out += jnp.reshape(layer["bias"], (1, -1))
            hidden = jnp.tanh(out) if place == "0" else out
        return hidden

    x = jnp.ones((5, 3))
    costs = [jax.jit(apply).lower(params, x).compile().cost_analysis() for apply in (model.apply, by_hand)]
    for kind in ("flops", "transcendentals", "bytes accessed"):
        assert costs[0][kind] == costs[1][kind] > 0


def test_the_module_is_built_at_init_and_not_at_apply():
    built = []

    def make(rngs):
        built.append(None)
        return Stack(rngs)

    model = functional(make)
    params = model.init(jax.random.key(0))
    before = len(built)
    model.apply(params, jnp.ones((5, 3)))
    jax.grad(lambda params: model.apply(params, jnp.ones((5, 3))).sum())(params)
    assert len(built) == before


def test_batch_statistics_are_refused():
    with pytest.raises(ValueError, match=r"mean \(BatchStat\).*use GroupNorm in place of BatchNorm"):
        functional(lambda rngs: nnx.BatchNorm(4, rngs=rngs))


def test_random_streams_are_refused():
    with pytest.raises(ValueError, match="parameters only, got .*RngKey.*leave out dropout"):
        functional(lambda rngs: nnx.Dropout(0.5, rngs=rngs))


def test_params_of_another_model_are_refused():
    model = functional(Stack)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="params must have the structure"):
        model.apply({"layers": {"0": params["layers"]["0"]}}, jnp.ones((5, 3)))


def test_features_need_the_method():
    model = functional(Stack)
    with pytest.raises(TypeError, match=r"a method features\(x\), got Stack"):
        model.features(model.init(jax.random.key(0)), jnp.ones((5, 3)))
