"""MAML against torch, on an MLP and on a CNN."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj

with np.load(Path(__file__).parent / "goldens/maml_torch.npz") as file:
    GOLDENS = dict(file)


def mlp(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


def convolved(x, kernel, bias):
    x = cj.nn.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(x + bias[None, None, None])


def cnn(params, x):
    x = cj.nn.max_pool(convolved(x, params["k1"], params["b1"]), (2, 2), (2, 2))
    x = convolved(x, params["k2"], params["b2"])
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None]


def under(prefix):
    return {name.removeprefix(prefix): array for name, array in GOLDENS.items() if name.startswith(prefix)}


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_maml_is_that_of_torch(name, num_steps, order, mode):
    model = {"mlp": mlp, "cnn": cnn}[name]

    def loss_fn(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(model(params, batch["x"]), batch["y"]).mean()

    params = {key: jnp.asarray(p, jnp.float32) for key, p in under(f"{name}/params/").items()}
    x, y = jnp.asarray(GOLDENS[f"{name}/x"], jnp.float32), jnp.asarray(GOLDENS[f"{name}/y"], jnp.int32)
    data = cj.ClientData({"x": x, "y": y}, jnp.int32(len(y)), jnp.int32(GOLDENS["num_support"]))
    tx = optax.sgd(float(GOLDENS["rate"]))
    local = cj.meta.maml(loss_fn, tx, num_steps, first_order=order == "first", mode=mode)
    delta = jax.jit(local.update)(params, (), data, jax.random.key(0))[0].delta
    want = under(f"{name}/{order}/{num_steps}/")
    assert delta.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_allclose(delta[key], array, rtol=1e-5, atol=1e-5 * np.abs(array).max(), err_msg=key)


def test_first_and_second_order_are_apart():
    first, second = under("cnn/first/3/"), under("cnn/second/3/")
    assert max(np.abs(first[key] - second[key]).max() for key in first) > 0.01
