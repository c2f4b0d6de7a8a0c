"""One round over a million clients: their data come from the host in blocks, and memory stays that of one block.

    python -m experiments.scale                                      # a million clients of noise
    python -m experiments.scale --images x.npy --labels y.npy        # rows of memory-mapped files
    python -m experiments.launch --processes 2 -- experiments.scale  # the same by two processes

While the device works on one block the host makes and sends the next; each of several processes makes its own clients
of every block. Each client trains an MLP 784-128-10 on 20 examples for two steps of SGD.
"""

import contextlib
import ctypes
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import cedarjax as cj
from cedarjax import nn
from experiments.files import write_json, write_npz
from experiments.launch import Distributed, joined

NUM_FEATURES, NUM_CLASSES, NUM_EXAMPLES, BATCH_SIZE = 784, 10, 20, 10
BlockFn = Callable[[int, int], cj.Cohort]


@dataclasses.dataclass(frozen=True)
class Options:
    """One streamed round over as many clients as you like."""

    clients: int = 1_000_000
    """Clients of the round."""
    block: int = 500
    """Clients that are brought to the devices at once, rounded up to whole chunks on all of them."""
    chunk: int = 50
    """Clients that are mapped together on each device."""
    devices: int | None = None
    """Devices of each process that the clients of a block are laid over; on a CPU, one of its cores each. Default: all
    that there are."""
    distributed: Distributed = "launched"
    """Together with whom: `launched`, the processes of `experiments.launch` if it started this one; `auto`, those that
    JAX finds (Slurm, Kubernetes, Open MPI, Cloud TPU); `off`, nobody."""
    images: Path | None = None
    """File of `[N, 784]` or `[N, 28, 28]` images of bytes, `.npy`, read through a memory map; default: noise."""
    labels: Path | None = None
    """File of their `[N]` labels, `.npy`."""
    json: Path | None = None
    """File for the numbers."""
    params: Path | None = None
    """File for the parameters after the round, `.npz`."""


class Layout(NamedTuple):
    """How the clients of a block lie on the devices of all processes."""

    mesh: Mesh | None
    """All devices, those of a process side by side; None for one."""
    block: int
    """Clients of a block."""
    start: int
    """Place in a block of the first client that this process makes."""
    share: int
    """Clients of a block that this process makes."""


def noise(first: int, count: int) -> cj.Cohort:
    """Clients `first ... first + count - 1` with random bytes for images; a client has the same ones in any block."""
    words = NUM_EXAMPLES * NUM_FEATURES // 8
    bits = np.random.Philox(key=0).advance(first * words // 4).random_raw(count * words)
    x = bits.view(np.uint8).reshape(count * NUM_EXAMPLES, NUM_FEATURES)
    y = (x[:, :8].sum(axis=1) % NUM_CLASSES).astype(np.int32)
    ids: Any = np.arange(first, first + count, dtype=np.int32)
    return cj.data.rows_as_cohort({"x": x, "y": y}, 0, count, NUM_EXAMPLES)._replace(client_id=ids)


def memory_mapped(images: Path, labels: Path) -> BlockFn:
    """Clients made of consecutive rows of two files."""
    x, y = (np.load(path, mmap_mode="r") for path in (images, labels))
    if x.ndim < 2 or int(np.prod(x.shape[1:])) != NUM_FEATURES:
        raise ValueError(f"--images must hold [N, {NUM_FEATURES}] bytes, got the shape {x.shape}.")
    if y.shape != x.shape[:1]:
        raise ValueError(f"--labels must hold one label an image, {x.shape[:1]}, got the shape {y.shape}.")
    rows = {"x": x.reshape(len(x), NUM_FEATURES), "y": y}
    return lambda first, count: cj.data.rows_as_cohort(rows, first, count, NUM_EXAMPLES)


def source(options: Options) -> BlockFn:
    """Checks the command line, as far as that can be done alone, and opens the files.

    Args:
      options: the command line.

    Returns:
      What makes clients.

    Raises:
      ValueError: if an option is out of range, or a file has not the right shape.
    """
    for name in ("clients", "block", "chunk", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if options.images is None and options.labels is None:
        return noise
    if options.images is None or options.labels is None:
        raise ValueError(f"--images and --labels go together, got {options.images} and {options.labels}.")
    return memory_mapped(options.images, options.labels)


def lay_out(options: Options) -> Layout:
    """Lays a block over the devices of all processes.

    Args:
      options: the command line.

    Returns:
      The layout, in which each process has neighbouring clients.

    Raises:
      ValueError: if a process has fewer devices than asked for.
    """
    processes = [jax.local_devices(process_index=number) for number in range(jax.process_count())]
    most = min(map(len, processes))
    wanted = most if options.devices is None else options.devices
    if wanted > most:
        raise ValueError(f"--devices must be at most {most}, got {wanted}.")
    devices = [device for local in processes for device in local[:wanted]]
    per_step = options.chunk * len(devices)
    block = -(-min(options.block, options.clients) // per_step) * per_step
    share = block // len(processes)
    mesh = None if len(devices) == 1 else Mesh(np.array(devices), ("clients",), axis_types=(AxisType.Auto,))
    return Layout(mesh, block, share * jax.process_index(), share)


def blocks(num_clients: int, layout: Layout, make: BlockFn) -> Iterator[cj.Cohort]:
    """What this process has of each block; the last one is filled up with absent clients."""

    def part(first: int) -> cj.Cohort:
        block = make(first, layout.share)
        weights: Any = np.where(block.client_id < num_clients, block.weights, 0).astype(np.float32)
        return block._replace(weights=weights)

    return map(part, range(layout.start, layout.start + num_clients, layout.block))


def problem() -> tuple[Callable[[], Any], cj.LossFn]:
    """What makes the initial parameters, and the loss on images of bytes."""
    model = nn.functional(lambda rngs: nn.MLP(NUM_FEATURES, (128,), NUM_CLASSES, rngs=rngs))
    cross_entropy = nn.cross_entropy(model.apply)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x = batch["x"].astype(jnp.float32) / 255
        return cross_entropy(params, {"x": x, "y": batch["y"].astype(jnp.int32)}, key)

    return lambda: model.init(jax.random.key(0)), loss_fn


def run(options: Options, console: Console) -> tuple[dict[str, Any], Any]:
    """One round.

    Args:
      options: the command line.
      console: where progress is shown.

    Returns:
      Clients, mean loss, seconds without compilation, milliseconds a client-step, and the peak memory of the process;
      and the new parameters.

    Raises:
      ValueError: if an option is out of range, or a file has not the right shape.
    """
    make, layout = source(options), lay_out(options)
    everywhere = None if layout.mesh is None else NamedSharding(layout.mesh, P())
    clients = None if layout.mesh is None else NamedSharding(layout.mesh, P("clients"))
    initial, loss_fn = problem()
    local = cj.local.sgd(loss_fn, optax.sgd(0.05), batch_size=BATCH_SIZE, representation="auto")
    stream = cj.stream_blocks(local, optax.sgd(1.0), chunk_size=options.chunk, mesh=layout.mesh)

    def begin() -> tuple[Any, Any]:
        state = stream.init(initial())
        return state, stream.start(state)

    def add(state: Any, totals: Any, block: cj.Cohort) -> tuple[Any, jax.Array]:
        totals, _, info = stream.add(state, totals, block, jax.random.key(1))
        return totals, jnp.where(block.weights > 0, info.loss, 0).sum()

    def finish(state: Any, totals: Any) -> Any:
        return stream.finish(state, totals, jax.random.key(1))[0].params

    state, totals = jax.jit(begin, out_shardings=everywhere)()
    ahead = cj.data.prefetch(blocks(options.clients, layout, make), size=1, sharding=clients)
    block: cj.Cohort | None = next(ahead)
    added = jax.jit(add, donate_argnums=1, out_shardings=everywhere).lower(state, totals, block).compile()
    losses: list[float] = []
    columns = (TextColumn("clients"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.clients)
        while block is not None:
            totals, loss = added(state, totals, block)
            block = next(ahead, None)  # made and sent while the device works
            losses.append(float(loss))  # waits for it: a fast host would queue up blocks
            progress.update(bar, completed=min(options.clients, len(losses) * layout.block))
    params = jax.block_until_ready(jax.jit(finish, out_shardings=everywhere)(state, totals))
    seconds = time.perf_counter() - start
    numbers = {
        "clients": options.clients,
        "block": layout.block,
        "chunk": options.chunk,
        "processes": jax.process_count(),
        "devices": 1 if layout.mesh is None else layout.mesh.size,
        "loss": sum(losses) / options.clients,
        "seconds": seconds,
        "ms_per_client_step": 1e3 * seconds / options.clients / (NUM_EXAMPLES // BATCH_SIZE),
        "peak_bytes": peak_bytes(),
    }
    return numbers, params


def peak_bytes() -> int:
    """The most memory that this process has held at once."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    # Begins, on Linux, with what the parent held when it started the process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def share_one_arena() -> None:
    """Has all threads allocate from one place, with glibc; does nothing with other allocators.

    Otherwise each of XLA's threads keeps large buffers that it has freed, and the peak creeps up with the blocks.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m experiments.scale", args=arguments)
    console = Console()
    share_one_arena()
    try:
        source(options)  # before the others are kept waiting
        if options.devices is not None and options.devices > jax.config.values["jax_num_cpu_devices"]:
            jax.config.update("jax_num_cpu_devices", options.devices)
        with joined(options.distributed):
            tell(options, console)
    except (ValueError, OSError) as error:
        console.print(f"[red]{error}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def tell(options: Options, console: Console) -> None:
    """Runs the round, and has one process print and write what came out."""
    first = jax.process_index() == 0
    numbers, params = run(options, console if first else Console(quiet=True))
    if not first:
        return
    console.print(
        f"{numbers['clients']:,} clients in {numbers['seconds']:.1f} s, {numbers['ms_per_client_step']:.3f} ms a "
        f"client-step, peak memory {numbers['peak_bytes'] / 2**20:.0f} MiB, mean loss {numbers['loss']:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    if options.json is not None:
        write_json(options.json, numbers)
    if options.params is not None:
        write_npz(options.params, dict(zip(cj.leaf_names(params), jax.tree.leaves(params), strict=True)))


if __name__ == "__main__":
    sys.exit(main())
