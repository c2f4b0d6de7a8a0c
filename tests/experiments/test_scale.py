import io
import json
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import cedarjax as cj
from experiments import scale

CLIENTS = 60


def run(**options):
    defaults = {"clients": CLIENTS, "block": 20, "chunk": 5, "devices": 1}
    numbers, params = scale.run(scale.Options(**{**defaults, **options}), Console(file=io.StringIO()))
    return numbers, dict(zip(cj.leaf_names(params), jax.tree.leaves(params), strict=True))


@pytest.fixture(scope="module")
def whole():
    """Loss and parameters of a round over all clients at once, each with dense weights, collected, then averaged."""
    initial, loss_fn = scale.problem()
    local = cj.local.sgd(loss_fn, optax.sgd(0.05), batch_size=scale.BATCH_SIZE)
    algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    cohort = jax.tree.map(jnp.asarray, scale.noise(0, CLIENTS))
    state, _, info = jax.jit(algorithm.step)(algorithm.init(initial()), cohort, jax.random.key(1))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, initial())
    assert min(jax.tree.leaves(moved)) > 1e-4
    return float(info.local.loss.mean()), dict(zip(cj.leaf_names(moved), jax.tree.leaves(state.params), strict=True))


def assert_same_round(numbers, params, whole):
    loss, want = whole
    assert numbers["loss"] == pytest.approx(loss, rel=1e-5)
    assert params.keys() == want.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "chunk", "devices", "width"),
    [(20, 5, 1, 20), (7, 3, 1, 9), (2000, 60, 1, 60), (20, 5, 2, 20), (1, 1, None, 8)],
)
def test_blocks_chunks_and_devices_are_a_matter_of_speed(block, chunk, devices, width, whole):
    """Where a block has 9 or 8 clients, the last one is not full."""
    numbers, params = run(block=block, chunk=chunk, devices=devices)
    assert_same_round(numbers, params, whole)
    assert numbers["block"] == width
    assert numbers["devices"] == (devices or len(jax.devices()))
    assert numbers["clients"] == CLIENTS and numbers["processes"] == 1
    assert numbers["seconds"] > 0
    assert numbers["ms_per_client_step"] == pytest.approx(1e3 * numbers["seconds"] / CLIENTS / 2)


@pytest.fixture
def files(tmp_path):
    data = scale.noise(0, CLIENTS).data.examples
    np.save(tmp_path / "x.npy", data["x"].reshape(-1, 28, 28))
    np.save(tmp_path / "y.npy", data["y"].reshape(-1).astype(np.int64))
    return {"images": tmp_path / "x.npy", "labels": tmp_path / "y.npy"}


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_mapped_files_are_arrays(devices, files, whole):
    assert_same_round(*run(devices=devices, **files), whole)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 2), (17, 13)])
def test_a_client_of_noise_is_itself_in_any_block(first, count):
    whole, part = scale.noise(0, 30), scale.noise(first, count)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[first : first + count]), part, whole)
    x = whole.data.examples["x"]
    assert x.shape == (30, scale.NUM_EXAMPLES, scale.NUM_FEATURES) and x.dtype == np.uint8
    assert len(np.unique(x.reshape(30, -1), axis=0)) == 30
    assert set(np.unique(whole.data.examples["y"])) == set(range(scale.NUM_CLASSES))


@pytest.mark.parametrize("num_clients", [1, 8, 11, 16, 17])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_have_every_client_once(processes, num_clients):
    share = 8 // processes
    layouts = [scale.Layout(None, 8, share * number, share) for number in range(processes)]
    parts = [list(scale.blocks(num_clients, layout, scale.noise)) for layout in layouts]
    assert {len(part) for part in parts} == {-(-num_clients // 8)}  # or some would wait for others
    for number, block in enumerate(zip(*parts, strict=True)):
        ids = np.concatenate([part.client_id for part in block])
        weights = np.concatenate([part.weights for part in block])
        np.testing.assert_array_equal(ids, 8 * number + np.arange(8))
        np.testing.assert_array_equal(weights, np.where(ids < num_clients, scale.NUM_EXAMPLES, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "--clients must be at least 1, got 0"),
        ({"block": 0}, "--block must be at least 1, got 0"),
        ({"chunk": -2}, "--chunk must be at least 1, got -2"),
        ({"devices": 0}, "--devices must be at least 1, got 0"),
        ({"devices": 1000}, r"--devices must be at most \d+, got 1000"),
        ({"images": Path("x.npy")}, r"--images and --labels go together, got x\.npy and None"),
        ({"labels": Path("y.npy")}, r"--images and --labels go together, got None and y\.npy"),
    ],
)
def test_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((40, 27, 28), (40,), r"--images must hold \[N, 784\] bytes, got the shape \(40, 27, 28\)"),
        ((784,), (784,), r"--images must hold \[N, 784\] bytes, got the shape \(784,\)"),
        ((40, 784), (39,), r"one label an image, \(40,\), got the shape \(39,\)"),
        ((40, 784), (40, 1), r"one label an image, \(40,\), got the shape \(40, 1\)"),
    ],
)
def test_files_must_have_the_right_shape(x, y, message, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(x, np.uint8))
    np.save(tmp_path / "y.npy", np.zeros(y, np.uint8))
    with pytest.raises(ValueError, match=message):
        run(images=tmp_path / "x.npy", labels=tmp_path / "y.npy")


ARGUMENTS = "--clients 60 --block 20 --chunk 5 --devices 1".split()


def test_the_command_prints_and_writes(tmp_path, capsys, whole):
    assert scale.main([*ARGUMENTS, "--json", str(tmp_path / "a.json"), "--params", str(tmp_path / "a.npz")]) == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    with np.load(tmp_path / "a.npz") as params:
        assert_same_round(numbers, dict(params), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]
    out = capsys.readouterr().out
    assert f"60 clients in {numbers['seconds']:.1f} s" in out and f"mean loss {numbers['loss']:.4f}" in out


def test_a_failure_while_writing_keeps_the_old_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.json").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert scale.main([*ARGUMENTS, "--json", str(tmp_path / "a.json")]) == 2
    assert "disk full" in capsys.readouterr().out
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_told_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "run", None)
    assert scale.main(["--clients", "0"]) == 2
    assert "--clients must be at least 1, got 0" in capsys.readouterr().out
    absent = str(tmp_path / "absent.npy")
    assert scale.main(["--images", absent, "--labels", absent]) == 2
    assert "absent.npy" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_covers_what_is_held_now():
    held = np.ones(100 << 20, np.uint8)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert scale.peak_bytes() >= pages * resource.getpagesize() >= held.nbytes


def test_peak_memory_without_proc(monkeypatch):
    monkeypatch.setattr(scale, "Path", lambda _: Path("/nowhere/at/all"))
    monkeypatch.setattr(scale.sys, "platform", "linux")
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before <= scale.peak_bytes() <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
