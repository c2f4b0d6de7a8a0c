"""The reference models: names, sizes, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cedarjax.core.names import layer_bytes, leaf_names
from cedarjax.nn import CNN, CNN1D, MLP, GroupNorm, cross_entropy, functional

MODELS = {
    "mlp": (lambda rngs: MLP(12, (8, 6), 3, rngs=rngs), (4, 12)),
    "cnn": (lambda rngs: CNN(2, (4, 6), 3, num_groups=2, rngs=rngs), (4, 9, 8, 2)),
    "cnn1d": (
        lambda rngs: CNN1D(2, 3, channels=(4, 6, 8), kernel_sizes=(5, 3, 3), num_groups=2, rngs=rngs),
        (4, 25, 2),
    ),
}
BLOCKS = {"mlp": 2, "cnn": 2, "cnn1d": 3}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_blocks_in_order_and_layers_of_the_params(name):
    make, shape = MODELS[name]
    order = []

    def features(x):
        out = make(nnx.Rngs(0)).features(x)
        order.extend(out)
        return out

    shapes = jax.eval_shape(features, jnp.ones(shape))
    assert order == [f"block{number}" for number in range(1, BLOCKS[name] + 1)]
    assert all(leaf.ndim == 2 and leaf.shape[0] == 4 for leaf in shapes.values())
    params = jax.eval_shape(functional(make).init, jax.random.key(0))
    assert set(params) == {*order, "head"}
    assert all(size > 0 for size in layer_bytes(params, tuple(order)))


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_of_every_client(name):
    make, shape = MODELS[name]
    model = functional(make)
    loss_fn = cross_entropy(model.apply)
    batch = {"x": jax.random.normal(jax.random.key(1), (3, *shape)), "y": jnp.tile(jnp.array([0, 1, 2, 0]), (3, 1))}

    def train(params, batch):
        def step(params, _):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch, jax.random.key(0))
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

        return jax.lax.scan(step, params, length=20)[1]

    keys = jax.random.split(jax.random.key(0), 3)
    losses = jax.jit(jax.vmap(lambda key, batch: train(model.init(key), batch)))(keys, batch)
    assert losses.shape == (3, 20) and (losses[:, -1] < 0.8 * losses[:, 0]).all()


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_convolution_or_select_and_scatter(name):
    make, shape = MODELS[name]
    model = functional(make)
    params = jax.eval_shape(jax.vmap(model.init), jax.random.split(jax.random.key(0), 2))
    grad = jax.vmap(jax.grad(lambda params, x: jnp.square(model.apply(params, x)).sum()))
    text = jax.jit(grad).lower(params, jnp.ones((2, *shape))).as_text()
    assert "dot_general" in text and "convolution" not in text and "select_and_scatter" not in text


def test_mlp_is_linear_maps_and_relus():
    model = functional(lambda rngs: MLP(12, (8, 6), 3, rngs=rngs))
    params = jax.tree.map(np.float64, model.init(jax.random.key(0)))
    assert leaf_names(params) == [
        f"{layer}/{leaf}" for layer in ("block1", "block2", "head") for leaf in ("bias", "kernel")
    ]
    x = np.random.default_rng(0).normal(size=(4, 3, 4))
    hidden = x.reshape(4, 12)
    for layer in ("block1", "block2"):
        hidden = np.maximum(hidden @ params[layer]["kernel"] + params[layer]["bias"], 0.0)
    expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    out = model.apply(jax.tree.map(jnp.float32, params), jnp.float32(x))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    features = model.features(jax.tree.map(jnp.float32, params), jnp.float32(x))
    np.testing.assert_allclose(features["block2"], hidden, rtol=1e-4, atol=1e-5)


def test_cnn_is_the_same_with_flax_layers():
    module = CNN(2, (4, 6), 3, num_groups=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 9, 8, 2))
    hidden = x
    for name in ("block1", "block2"):
        block = getattr(module, name)
        conv = nnx.Conv(*block.conv.kernel.shape[-2:], (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        conv.kernel[...] = block.conv.kernel[...]
        hidden = nnx.relu(nnx.GroupNorm(block.conv.kernel.shape[-1], 2, rngs=nnx.Rngs(0))(conv(hidden)))
        hidden = nnx.max_pool(hidden, window_shape=(2, 2), strides=(2, 2))
    assert hidden.shape == (4, 2, 2, 6)
    np.testing.assert_allclose(module.features(x)["block2"], hidden.reshape(4, -1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(module(x), module.head(hidden.mean(axis=(1, 2))), rtol=1e-3, atol=1e-4)


def test_convolutional_blocks_are_normalised_in_groups():
    module = nnx.eval_shape(lambda: CNN1D(3, 6, rngs=nnx.Rngs(0)))
    assert isinstance(module.block1.norm, GroupNorm) and module.block1.norm.num_groups == 8
    params = jax.eval_shape(functional(lambda rngs: CNN1D(3, 6, rngs=rngs)).init, jax.random.key(0))
    assert leaf_names({"block1": params["block1"]}) == ["block1/conv/kernel", "block1/norm/bias", "block1/norm/scale"]


def test_sensor_model_has_unequal_blocks_that_fit_half_a_budget():
    params = jax.eval_shape(functional(lambda rngs: CNN1D(3, 6, rngs=rngs)).init, jax.random.key(0))
    sizes = [size // 4 for size in layer_bytes(params, ("block1", "block2", "block3", "block4"))]
    assert sizes == [544, 10368, 20608, 25760]
    assert sum(sizes) + 80 * 6 + 6 == sum(leaf.size for leaf in jax.tree.leaves(params)) == 57766
    assert max(sizes) < 0.5 * sum(sizes)


def test_convolutional_models_take_inputs_of_any_size():
    model = functional(lambda rngs: CNN1D(3, 6, channels=(8, 8, 8), kernel_sizes=(5, 3, 3), rngs=rngs))
    params = jax.jit(model.init)(jax.random.key(0))
    for length in (1, 2, 7):
        assert jnp.isfinite(jax.jit(model.apply)(params, jnp.ones((2, length, 3)))).all()
    images = functional(lambda rngs: CNN(1, (8, 8), 5, rngs=rngs))
    params = jax.eval_shape(images.init, jax.random.key(0))
    assert jax.eval_shape(images.apply, params, jnp.ones((2, 1, 5, 1))).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: MLP(4, (), 3, rngs=rngs), "hidden not empty"),
        (lambda rngs: MLP(4, (8, 0), 3, rngs=rngs), r"at least 1.*\(4, 8, 0, 3\)"),
        (lambda rngs: CNN(1, (), 3, rngs=rngs), "channels not empty"),
        (lambda rngs: CNN(0, (8,), 3, rngs=rngs), "at least 1"),
        (lambda rngs: CNN(1, (8,), 3, kernel_size=0, rngs=rngs), "kernel sizes must be at least 1"),
        (lambda rngs: CNN(1, (12,), 3, rngs=rngs), r"num_groups must .* divide channels \(12,\), got 8"),
        (lambda rngs: CNN1D(1, 3, channels=(8, 8), kernel_sizes=(5,), rngs=rngs), "got 1 for 2 blocks"),
        (lambda rngs: CNN1D(1, 3, num_groups=0, rngs=rngs), "num_groups must be at least 1"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functional(make).init, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (4, 13)), ("cnn", (4, 9, 8, 3)), ("cnn", (4, 9, 8)), ("cnn1d", (4, 25, 3))]
)
def test_bad_inputs(name, shape):
    with pytest.raises(ValueError, match="x must have"):
        model = functional(MODELS[name][0])
        jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), jnp.ones(shape))
