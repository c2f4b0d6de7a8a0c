from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import take_info


class Told(NamedTuple):
    count: int
    info: object = None


class Nested(NamedTuple):
    inner: Told
    info: object = None


def test_infos_come_in_the_order_of_the_chain():
    state = (Told(1, {"a": 2}), optax.EmptyState(), (Told(3), Told(4, "b")))
    rest, infos = take_info(state)
    assert rest == (Told(1), optax.EmptyState(), (Told(3), Told(4)))
    assert infos == ({"a": 2}, "b")
    assert take_info(rest) == (rest, ())


def test_infos_inside_a_state_that_tells_are_taken_too():
    assert take_info(Nested(Told(1, "inner"), "outer")) == (Nested(Told(1)), ("outer", "inner"))


def test_states_without_infos_stay_as_they_are():
    state = optax.adam(1e-3).init({"w": jnp.ones(2)})
    rest, infos = take_info(state)
    assert infos == () and jax.tree.structure(rest) == jax.tree.structure(state)
