"""FedDyn's server: the mean of the trained models, shifted by the sum of all that clients ever moved.

Reference: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, `Federated Learning Based on Dynamic Regularization
<https://arxiv.org/abs/2111.04263>`_, 2021; the client's part is `local.feddyn`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import Params, accumulator


class FedDynServerState(NamedTuple):
    """State of `feddyn`."""

    shift: Params
    """The paper's `h / alpha`, which is `(1 / N) sum_t sum_{k in P_t} (theta^{t-1} - theta_k^t)`; float32 or wider."""


def feddyn(participation: float | jax.Array = 1.0) -> optax.GradientTransformation:
    """Moves the parameters to `mean_k theta_k - h / alpha`.

    The paper's server does `h <- h - (alpha / N) sum_{k in P} (theta_k - theta)` and `theta <- mean_{k in P} theta_k -
    h / alpha`. With the pseudo-gradient `d = theta - mean_k theta_k` and `|P| / N` clients that take part, `h / alpha`
    grows by `|P| / N d`, and the step is `-(d + h / alpha)`. So it is kept divided by `alpha`, which the server then
    need not know.

    Args:
      participation: `|P| / N`, the part of all clients that takes part in a round, above 0 and at most 1.

    Returns:
      An optax optimiser, to follow an aggregator: `optax.chain(robust.mean(), server.feddyn(0.1))`, without another
      optimiser after it.

    Raises:
      ValueError: if `participation` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = feddyn(participation=0.5)
      >>> state = tx.init(jnp.float32(0.0))
      >>> for mean_of_clients in (2.0, 3.0):
      ...     step, state = tx.update(0.0 - jnp.float32(mean_of_clients), state)
      ...     print(step)
      3.0
      5.5
    """
    if isinstance(participation, int | float) and not 0 < participation <= 1:
        raise ValueError(f"participation must satisfy 0 < participation <= 1, got {participation}.")

    def init(params: Params) -> FedDynServerState:
        return FedDynServerState(jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), accumulator(p)), params))

    def update(
        updates: Params, state: FedDynServerState, params: Params | None = None
    ) -> tuple[Params, FedDynServerState]:
        del params
        shift = jax.tree.map(
            lambda s, d: s + jnp.asarray(participation, s.dtype) * d.astype(s.dtype), state.shift, updates
        )
        step = jax.tree.map(lambda s, d: -(d.astype(s.dtype) + s).astype(d.dtype), shift, updates)
        return step, FedDynServerState(shift)

    return optax.GradientTransformation(init, update)
