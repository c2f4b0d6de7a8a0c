"""What a server's transformations tell about the last round, kept apart from what they need to go on.

An optax state has a fixed shape from `init` on, but what an aggregator tells (who was dropped, how similar each client
was) has a client axis, whose length `init` does not know. Such a state has a field `info`: `None` after `init`, filled
by `update`. `take_info` removes it, so that the state can be the carry of a scan. `federated_round` does this after
every step.
"""

from typing import Any

import jax

from cedarjax.core.types import PyTree


def _tells(node: Any) -> bool:
    return hasattr(node, "_fields") and "info" in node._fields and node.info is not None


def take_info(opt_state: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Splits an optax state into what is needed to go on and what is merely told.

    Args:
      opt_state: state of any optax transformation, chained or nested.

    Returns:
      The state with every field `info` set to `None`, and the infos in the order of the chain.

    Example:
      >>> from typing import NamedTuple
      >>> class State(NamedTuple):
      ...     count: int
      ...     info: dict | None = None
      >>> take_info((State(3, {"dropped": 1}), (), State(4)))
      ((State(count=3, info=None), (), State(count=4, info=None)), ({'dropped': 1},))
    """
    infos: list[PyTree] = []

    def strip(node: Any) -> Any:
        if not _tells(node):
            return node
        infos.append(node.info)
        rest, inner = take_info(node._replace(info=None))
        infos.extend(inner)
        return rest

    return jax.tree.map(strip, opt_state, is_leaf=_tells), tuple(infos)
