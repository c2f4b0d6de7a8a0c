import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import Arrival, AsyncServerState, Upload, async_server, finite_upload, uploaded_model


def arrival_of(delta, mask=None, weight=1.0):
    shared = jax.tree.map(lambda d: jnp.ones(jnp.shape(d), d.dtype), delta)
    zero = jnp.int32(0)
    return Arrival(Upload(delta, mask), shared, zero, jnp.float32(weight), zero, jnp.float32(0.0))


@pytest.mark.parametrize(
    ("a", "b", "mask", "finite"),
    [
        ([1.0, 2.0], 3.0, None, True),
        ([1.0, np.nan], 3.0, None, False),
        ([1.0, 2.0], -np.inf, None, False),
        ([1.0, np.nan], 3.0, (0.0, 1.0), True),
        ([1.0, np.nan], 3.0, (0.5, 1.0), False),
        ([1.0, 2.0], 3.0, (1.0, np.nan), False),
    ],
)
def test_finite_upload(a, b, mask, finite):
    mask = None if mask is None else {"a": jnp.float32(mask[0]), "b": jnp.float32(mask[1])}
    assert finite_upload(Upload({"a": jnp.array(a), "b": jnp.float32(b)}, mask)) == finite


def test_what_a_rule_sees():
    """Arrays, float32 masks for every leaf, and zeros where nothing was uploaded."""
    seen = []

    def rule(state, arrival):
        seen.append(arrival)
        return state, jnp.float32(0.25)

    server = async_server(rule, init_memory=lambda params: {"sum": jnp.zeros(2)})
    state = server.init({"a": jnp.zeros(2), "b": jnp.zeros(())})
    assert isinstance(state, AsyncServerState) and state.version == 0 and state.memory["sum"].shape == (2,)
    delta = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.float32(2.0)}
    mask = {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}
    with jax.disable_jit():
        _, receipt = server.receive(state, arrival_of(delta, mask))
        server.receive(state, arrival_of({"a": jnp.ones(2), "b": jnp.float32(2.0)}))
    first, second = seen
    assert receipt.accepted and receipt.coefficient == 0.25 and not receipt.merged
    assert first.upload.delta["a"].tolist() == [0, 0] and first.upload.delta["b"] == 2
    assert [float(m) for m in jax.tree.leaves((first.upload.mask, second.upload.mask))] == [0, 1, 1, 1]
    assert all(m.dtype == jnp.float32 for m in jax.tree.leaves(first.upload.mask))


def test_a_state_has_buffers_of_its_own():
    params = {"a": jnp.ones(3)}
    server = async_server(lambda state, arrival: (state, jnp.float32(1.0)), init_memory=lambda params: params)
    state = server.init(params)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert params["a"].tolist() == [1, 1, 1]


def test_the_model_of_an_upload_is_at_least_float32():
    model = uploaded_model(arrival_of({"a": jnp.full(2, 2**-10, jnp.bfloat16)}))
    assert model["a"].dtype == jnp.float32 and model["a"].tolist() == [1 - 2**-10] * 2
