"""Settings of the test run, and the fixtures that tests of several families share.

Tests under `tests/` run with strict dtype promotion and without rank promotion; doctests run with JAX's defaults, as a
reader would run them. Everything below that concerns devices and threads has to happen before JAX starts its backend.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A worker of pytest-xdist is one process among several on few cores. Subprocesses that tests start inherit this.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")


def xla_flags() -> str:
    """Flags under which XLA:CPU compiles the thousands of small programs of the tests in a third of the time.

    Without its newer code generator and most of LLVM's optimisation, that is, if this version knows the flags: one that
    it does not know would end the process. `make test-all` sets the flags itself and compiles as users do.
    """
    single = "--xla_cpu_multi_thread_eigen=false"
    quick = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    quick += " --xla_llvm_disable_expensive_passes=true"
    attempt = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(attempt, env={**os.environ, "XLA_FLAGS": quick}, capture_output=True, check=False)
    return single if known.returncode else f"{single} {quick}"


if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = xla_flags()

import hypothesis  # noqa: E402
import jax  # noqa: E402

collect_ignore_glob = ["*/goldens/*"]  # the scripts that made them need other libraries

ROOT = Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
MESH_SIZE = 4
MANY_PROGRAMS = {"compress", "meta", "privacy"}
LONG_LAWS = ("agrees_without_jit", "agrees_across_layouts", "agrees_when_sharded", "reads_weights_by_layer")
SPINE = ("sgd", "maml", "compressed", "mean", "cedar")
"""Kernels whose long laws are quick tests all the same."""

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
# JAX writes cache entries in place and without a lock: one folder a worker, so that nobody reads half an entry.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache/jax" / os.environ.get("PYTEST_XDIST_WORKER", "main")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

hypothesis.settings.register_profile("cedarjax", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("cedarjax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Double precision, and the laws that cost most for what they catch, are for `make test-all`."""
    for item in items:
        is_spine = item.path.name == "test_contracts.py" and any(f"[{kernel}-" in item.name for kernel in SPINE)
        law_is_long = any(law in item.name for law in LONG_LAWS) and not is_spine
        if law_is_long or "x64" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def strict_numerics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test refuses implicit rank promotion and implicit dtype promotion.

    `optax.adam` and its relatives mix a Python float with an int32 step count, which strict promotion refuses. A test
    that steps them is marked `@pytest.mark.standard_promotion` (or `marks=` of a `pytest.param`); ranks stay strict.
    """
    promotion = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion(promotion):
        yield


@pytest.fixture(autouse=True)
def fast_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles as quickly as it can in families where most of the time is XLA's.

    What is compared with no jit is compiled as it would be for a user, and so is what memory is measured of.
    """
    optimised = request.path.parent.name not in MANY_PROGRAMS or any(n in request.node.name for n in ("jit", "memory"))
    if optimised:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Iterator[None]:
    """What a file compiled goes when it ends: thousands of programs are gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """A mesh of four devices along one axis, `clients`."""
    devices = jax.devices()
    if len(devices) < MESH_SIZE:
        pytest.skip(f"needs {MESH_SIZE} devices, found {len(devices)} ({devices[0].platform})")
    return jax.make_mesh(
        (MESH_SIZE,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:MESH_SIZE]
    )


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """The folder of real data sets: `$CEDARJAX_DATA`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("CEDARJAX_DATA") or ROOT.parent / "shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CEDARJAX_DATA to the folder that holds wisdm/, mnist/, ...")
    return folder
