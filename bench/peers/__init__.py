"""Other libraries on the same work: each in an environment and a process of its own, the peer's module inside.

`<peer>.txt` lists what its environment holds (and `<peer>.nodeps.txt` what is put there without its dependencies),
`<peer>.py` does the work there. Nothing here needs more than NumPy; what a peer's module imports is installed in the
peer's environment alone.
"""

from collections.abc import Callable
from pathlib import Path

from bench.peers.environment import PeerUnavailable as PeerUnavailable
from bench.peers.environment import ensure
from bench.peers.process import Running as Running
from bench.peers.task import AnyTask
from bench.peers.task import RuleTask as RuleTask
from bench.peers.task import Task as Task

_FEDAVG, _MAML, _RULE = "fedavg", "maml", "rule"
_KINDS = {
    "fedjax": (_FEDAVG,),
    "drjax": (_FEDAVG, _MAML),
    "pfl": (_FEDAVG,),
    "torch_loop": (_FEDAVG,),
    "torch_vmap": (_FEDAVG, _MAML),
    "torchopt": (_MAML,),
    "learn2learn": (_MAML,),
    "torch_maml": (_MAML,),
    "byzfl": (_RULE,),
}
_NETWORKS = ("mlp", "cnn", "femnist")
_MODELS = {_FEDAVG: _NETWORKS, _MAML: _NETWORKS, _RULE: ("matrix",)}

PEERS: tuple[str, ...] = tuple(_KINDS)
"""Names of all peers."""

__all__ = ["PEERS", "PeerUnavailable", "RuleTask", "Running", "Task", "start", "supports"]


def supports(name: str, kind: str, model: str) -> bool:
    """Whether the peer does tasks of this kind on this model, see `Task` and `RuleTask`.

    Raises:
      ValueError: if there is no such peer.
    """
    if name not in _KINDS:
        raise ValueError(f"name must be one of {', '.join(PEERS)}, got {name!r}.")
    return kind in _KINDS[name] and model in _MODELS.get(kind, ())


def start(name: str, task: AnyTask, *, tell: Callable[[str], None]) -> Running:
    """Starts a peer on a task; on first use this builds its environment.

    Args:
      name: one of `PEERS`.
      task: what it is to do.
      tell: called with a line on what is going on.

    Returns:
      The peer, warmed up; close it, or use it as a context manager.

    Raises:
      PeerUnavailable: if it does not do such tasks, cannot be installed, or does not get through its first call.
      ValueError: if there is no such peer.
    """
    if not supports(name, task.kind, task.model):
        raise PeerUnavailable(f"{name} does not do {task.kind} on {task.model}")
    python = ensure(name, Path(__file__).with_name(f"{name}.txt"), tell=tell)
    tell(f"warming up {name}")
    return Running(name, python, f"bench.peers.{name}", task)
