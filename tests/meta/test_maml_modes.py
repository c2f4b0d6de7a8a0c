"""MAML in mixed mode, of a part, and over many rows: the same numbers, and how much memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.meta import inner
from tests.meta import meta_oracles as oracle

CURVATURE = np.array([0.5, 1.0, 3.0])


def quadratic(w, batch, key):
    return 0.5 * jnp.mean(((w[None] - batch["x"]) ** 2) @ jnp.asarray(CURVATURE, w.dtype))


@pytest.mark.parametrize("num_steps", [1, 10])
def test_quadratics_in_closed_form_in_mixed_mode(num_steps, x64):
    """`theta_m - s = (1 - a A)^m (theta - s)`, and the meta-gradient is `(1 - a A)^m A (theta_m - q)`."""
    rng = np.random.default_rng(0)
    s, q = ({"x": rng.normal(size=(count, 3)), "y": np.zeros(count)} for count in (4, 3))
    w, shrink = rng.normal(size=3), (1 - 0.2 * CURVATURE) ** num_steps
    adapted = s["x"].mean(0) + shrink * (w - s["x"].mean(0))
    local = cj.meta.maml(quadratic, optax.sgd(0.2), num_steps, mode="mixed")
    delta, _ = oracle.update(local, jnp.asarray(w), oracle.client(s, q))
    np.testing.assert_allclose(delta, shrink * CURVATURE * (adapted - q["x"].mean(0)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_against_finite_differences(mode, num_steps, x64):
    s, q, w = oracle.problem(1)

    def objective(v):
        for _ in range(num_steps):
            v = v - 1.5 * oracle.grad(v, s)
        return oracle.loss(v, q)

    local = cj.meta.maml(oracle.loss_fn, optax.sgd(1.5), num_steps, mode=mode)
    delta, info = oracle.update(local, jnp.asarray(w), oracle.client(s, q))
    np.testing.assert_allclose(delta, oracle.slopes(objective, w), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(info.loss, objective(w), rtol=1e-12)
    np.testing.assert_allclose(info.support_loss, oracle.loss(w, s), rtol=1e-12)


def test_one_step_is_one_hessian_vector_product(x64):
    """`(I - a H) grad`, the support gradient's derivative taken forward."""
    s, q, w = oracle.problem(2)
    data, params = oracle.client(s, q, padding=0), jnp.asarray(w)
    support, query = (cj.core.take_rows(data.examples, jnp.arange(*ends)) for ends in ((5,), (5, 11)))

    def closed_form(w):
        gradient = functools.partial(jax.grad(oracle.loss_fn), batch=support, key=None)
        value, g = jax.value_and_grad(oracle.loss_fn)(w - 0.9 * gradient(w), query, None)
        return g - 0.9 * jax.jvp(gradient, (w,), (g,))[1], value

    local = cj.meta.maml(oracle.loss_fn, optax.sgd(0.9), 1, mode="mixed")
    delta, info = oracle.update(local, params, data)
    want, value = closed_form(params)
    np.testing.assert_allclose(delta, want, rtol=1e-12)
    np.testing.assert_allclose(info.loss, value, rtol=1e-12)


def network(params, batch, key):
    h = jnp.tanh(batch["x"] @ params["body"])
    noise = jax.random.normal(key, h.shape, h.dtype)
    return jnp.mean(((h + 0.1 * noise) @ params["head"] - batch["y"]) ** 2)


def network_problem(width=6, seed=0, count=5):
    rng = np.random.default_rng(seed)
    s, q = ({"x": rng.normal(size=(count, 4)), "y": rng.normal(size=count)} for _ in range(2))
    return {"body": jnp.asarray(rng.normal(size=(4, width))), "head": jnp.asarray(rng.normal(size=width))}, s, q


OPTIMISERS = {
    "momentum": lambda: optax.sgd(0.2, momentum=0.9),
    "adam": lambda: optax.adam(0.1, eps_root=1e-8),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), cj.meta.clip_by_global_norm(0.3), optax.sgd(0.5)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("optimiser", "adapted", "remat"),
    [("momentum", None, True), ("momentum", "head", False), ("adam", "head", True), ("decay", "body", True)],
)
def test_mixed_mode_changes_no_number(optimiser, adapted, remat, x64):
    params, s, q = network_problem()
    data, tx = oracle.client(s, q), OPTIMISERS[optimiser]()
    options = {"adapted": adapted, "batch_size": 3}
    want = oracle.update(cj.meta.maml(network, tx, 3, **options), params, data)
    got = oracle.update(cj.meta.maml(network, tx, 3, mode="mixed", remat=remat, **options), params, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
    first, _ = oracle.update(cj.meta.maml(network, tx, 3, first_order=True, **options), params, data)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), first, want[0]))) > 1e-3


@pytest.mark.parametrize(("mode", "adapted"), [("reverse", None), ("mixed", "head")])
def test_many_rows_are_taken_in_blocks(mode, adapted, x64, monkeypatch):
    """The mean of blocks is the mean, whatever rows of padding or of the other set a block holds."""
    params, s, q = network_problem(count=11)
    quiet = lambda params, batch, key: network(params, batch, jax.random.key(0))  # noqa: E731
    locals_ = {size: cj.meta.maml(quiet, optax.sgd(0.3), 2, mode=mode, adapted=adapted) for size in (1024, 4)}
    data = oracle.client(s, q, padding=9)
    sets = [data, data._replace(num_support=jnp.int32(0)), data._replace(num_support=data.num_examples)]
    for one in sets:
        results = []
        for size, local in locals_.items():
            monkeypatch.setattr(inner, "BLOCK_SIZE", size)
            results.append(oracle.update(local, params, one))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), *results)


@pytest.mark.parametrize(("representation", "adapted"), [("lowrank", None), ("auto", None), ("lowrank", "head")])
def test_low_rank_updates_in_mixed_mode(representation, adapted, x64):
    params, s, q = network_problem(width=40)
    data = oracle.client(s, q)
    options = {"mode": "mixed", "adapted": adapted}
    want, _ = oracle.update(cj.meta.maml(network, optax.sgd(0.2), 2, **options), params, data)
    local = cj.meta.maml(network, optax.sgd(0.2), 2, representation=representation, **options)
    got, info = oracle.update(local, params, data)
    got = cj.dense(got)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
    assert info.rank["head"] == 0
    if adapted is None:
        assert (info.rank["body"] > 0) == (representation == "lowrank")


def shapes(tree):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple))


def multi_layer(params, batch, key):
    h = batch["x"]
    for kernel, bias in params[:-1]:
        h = jax.nn.relu(h @ kernel + bias[None])
    logits = h @ params[-1][0] + params[-1][1][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def temporary_memory(local, params, num_features, num_rows):
    """MiB beside arguments and results."""
    examples = {
        "x": jax.ShapeDtypeStruct((num_rows, num_features), jnp.float32),
        "y": jax.ShapeDtypeStruct((num_rows,), jnp.int32),
    }
    count = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(local.update).lower(params, (), cj.ClientData(examples, count, count), key).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="said of XLA:CPU; an H200 took 34.0 and 35.0 MiB")
def test_memory_of_ten_inner_steps():
    """Four layers of 256 units on images of 784 numbers, 2048 support and 2048 query examples."""
    sizes = [784, 256, 256, 256, 256, 10]
    params = shapes([[(a, b), (b,)] for a, b in zip(sizes[:-1], sizes[1:], strict=True)])
    memory = {
        mode: temporary_memory(cj.meta.maml(multi_layer, optax.sgd(0.01), 10, mode=mode), params, 784, 4096)
        for mode in ("reverse", "mixed")
    }
    assert memory["reverse"] < 50
    assert memory["mixed"] <= memory["reverse"]


def test_memory_holds_no_copies_of_what_inner_steps_do_not_change():
    sizes = [16, 256, 256, 4]
    params = shapes([[(a, b), (b,)] for a, b in zip(sizes[:-1], sizes[1:], strict=True)])
    for mode in ("reverse", "mixed"):
        few, many = (
            temporary_memory(
                cj.meta.anil(multi_layer, optax.sgd(0.01), num_steps, lambda name: name.startswith("2"), mode=mode),
                params,
                16,
                32,
            )
            for num_steps in (2, 40)
        )
        body = 256 * 256 * 4 / 2**20
        assert many - few < body  # the body is 38 times that, the head a 64th


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be .* got 'forward'"):
        cj.meta.maml(oracle.loss_fn, optax.sgd(0.1), 1, mode="forward")
