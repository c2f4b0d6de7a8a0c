"""A flax nnx module as pure functions of a plain nested dict of parameters.

The module's graph is read once, abstractly; `init`, `apply` and `features` merely put arrays in their places, which
costs tracing time and nothing in the compiled program. Hold no state but parameters: batch statistics would have to
be averaged over clients, and random streams would hide a key (see `LossFn` for where keys go in).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx


class Model(NamedTuple):
    """Pure functions of one model; jit, vmap over parameters and differentiate them at will."""

    init: Callable[[jax.Array], dict[str, Any]]
    """`init(key) -> params`, a nested dict with string keys, for example `params["block1"]["kernel"]`."""
    apply: Callable[[Any, jax.Array], jax.Array]
    """`apply(params, x [B, ...]) -> outputs [B, K]`."""
    features: Callable[[Any, jax.Array], dict[str, jax.Array]]
    """`features(params, x [B, ...]) -> {layer name: [B, F_l]}`, activations of the judged layers."""


def functional(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Turns a flax nnx module into a `Model`.

    Args:
      make_module: builds the module from its random streams; it must be callable on `x`, and have a method
        `features(x) -> {layer name: [B, F_l]}` if the model's `features` are to be used.

    Returns:
      The model; its parameters carry the attribute names of the module as keys, list positions as strings.

    Raises:
      ValueError: if the module holds anything but parameters, for example batch statistics.
      TypeError: by `features`, if the module has no such method.

    Example:
      >>> import jax
      >>> from cedarjax.nn.models.mlp import MLP
      >>> model = functional(lambda rngs: MLP(4, (8, 8), 3, rngs=rngs))
      >>> params = model.init(jax.random.key(0))
      >>> sorted(params), params["block1"]["kernel"].shape
      (['block1', 'block2', 'head'], (4, 8))
      >>> model.apply(params, jax.numpy.ones((5, 4))).shape
      (5, 3)
    """
    graph, variables, *others = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))), nnx.Param, ...)
    _check_only_params(others[0])
    expected = jax.tree.structure(_string_keys(nnx.to_pure_dict(variables)))

    def init(key: jax.Array) -> dict[str, Any]:
        return _string_keys(nnx.to_pure_dict(nnx.state(make_module(nnx.Rngs(key)), nnx.Param)))

    def bind(params: Any) -> Any:
        structure = jax.tree.structure(params)
        if structure != expected:
            raise ValueError(f"params must have the structure {expected}, got {structure}.")
        state = jax.tree.map(lambda leaf: leaf, variables)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return bind(params)(x)

    def features(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        module = bind(params)
        if not hasattr(module, "features"):
            raise TypeError(f"make_module must build a module with a method features(x), got {type(module).__name__}.")
        return module.features(x)

    return Model(init, apply, features)


def _check_only_params(state: Any) -> None:
    """Refuses batch statistics, random streams and other state."""
    flat = nnx.to_flat_state(state)
    found = {"/".join(map(str, path)): type(variable).__name__ for path, variable in flat}
    if not found:
        return
    names = ", ".join(f"{path} ({kind})" for path, kind in found.items())
    if any(isinstance(variable, nnx.BatchStat) for _, variable in flat):
        advice = "use GroupNorm in place of BatchNorm, whose statistics clients cannot average."
    else:
        advice = "leave out dropout and other stateful layers."
    raise ValueError(f"make_module must build a module that holds parameters only, got {names}: {advice}")


def _string_keys(tree: Any) -> Any:
    """A nested dict with every key as a string, so that checkpoints and key paths agree."""
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
