"""The program from its command line: results, resuming, interrupts, and what it says of bad input."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import checkpoints, files
from experiments.cedar import Config, load_federation, make_plan
from experiments.comparison import Comparison, slug, told_steps
from experiments.seeds import OverSeeds
from experiments.setting import make_setting, stack_datasets
from experiments.training import Trainer, split_rounds
from experiments.variants import SUITES, Variant

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.standard_promotion

SMALL = ["--dataset", "synthetic-iot", "--seeds", "2", "--rounds", "4", "--adapt-steps", "2"]


def program(*arguments, cwd, check=None):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(ROOT / ".cache" / "program")}
    command = [sys.executable, "-m", "experiments.cedar", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def small_setting():
    config = Config(dataset="digits", seeds=2, rounds=4, adapt_steps=2)
    setting = make_setting(lambda seed: load_federation(config, seed), range(2), (8, 8))
    plan = make_plan(config, load_federation(config, 0), "small")
    return setting, plan._replace(participation=0.1) if hasattr(plan, "_replace") else plan


def tiny(setting, plan, **variant):
    preset = plan.preset._replace(participation=0.06, rounds=4)
    return Trainer(setting, preset, Variant("x", **variant))


def test_segments_are_one_run_bit_for_bit(small_setting):
    setting, plan = small_setting
    trainer = tiny(setting, plan, budget=0.9)
    whole, _ = trainer.segment(trainer.init(), 4)
    halves = trainer.init()
    for _ in range(2):
        halves, _ = trainer.segment(halves, 2)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), whole, halves)))


def test_restored_state_goes_on_bit_for_bit(small_setting, tmp_path):
    setting, plan = small_setting
    trainer = tiny(setting, plan, num_skipped=1)
    state, _ = trainer.segment(trainer.init(), 2)
    checkpoints.save(tmp_path, 2, state)
    rounds, restored = checkpoints.restore(tmp_path, trainer.init())
    assert rounds == 2
    straight, _ = trainer.segment(state, 2)
    resumed, _ = trainer.segment(restored, 2)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), straight, resumed)))


def test_counted_bytes_are_those_of_the_masks(small_setting):
    setting, plan = small_setting
    trainer = tiny(setting, plan, num_skipped=1)
    _, segment = trainer.segment(trainer.init(), 3)
    layers = {name: sum(x[0].nbytes for x in jax.tree.leaves(setting.params[name])) for name in ("block1", "block2")}
    head = sum(x[0].nbytes for x in jax.tree.leaves(setting.params["head"]))
    per_client = segment.upload_rate @ np.array([layers["block1"], layers["block2"]]) + head + 1
    np.testing.assert_allclose(segment.uploaded_bytes, segment.cohort * per_client, rtol=1e-6)
    assert (segment.full_bytes == segment.cohort * (sum(layers.values()) + head)).all()


def test_a_poisoned_client_flips_its_own_labels_only(small_setting):
    setting, plan = small_setting
    trainer = tiny(setting, plan, attack="label_flip")
    for seed in range(2):
        owner = np.repeat(np.arange(setting.num_train), np.diff(np.asarray(setting.train.offsets[seed])))
        before = np.asarray(setting.train.examples["y"][seed])[: len(owner)]
        after = np.asarray(trainer.train.examples["y"][seed])[: len(owner)]
        bad = np.asarray(trainer.byzantine[seed])[owner]
        assert bad.any() and not bad.all()
        np.testing.assert_array_equal(after, np.where(bad, setting.num_outputs - 1 - before, before))


def test_detection_is_counted(small_setting):
    setting, plan = small_setting
    trainer = tiny(setting, plan, server="screening", attack="sign_flip")
    _, segment = trainer.segment(trainer.init(), 3)
    assert (segment.caught <= segment.attackers).all()
    assert (segment.caught + segment.wronged <= segment.cohort).all()


def test_seeds_over_devices_are_seeds_in_a_loop():
    values = np.arange(5, dtype=np.float32)
    program = OverSeeds(lambda x, shared: x * x + shared, 5)
    np.testing.assert_array_equal(program(values, np.float32(1)), values**2 + 1)
    np.testing.assert_array_equal(program(program(values, np.float32(1)), np.float32(0)), (values**2 + 1) ** 2)


def test_stacked_federations_keep_their_rows(small_setting):
    setting, _ = small_setting
    config = Config(dataset="digits")
    from experiments.datasets import TRAIN, to_dataset

    single = [to_dataset(load_federation(config, seed), TRAIN) for seed in range(2)]
    stacked = stack_datasets(single)
    for seed, one in enumerate(single):
        np.testing.assert_array_equal(stacked.examples["x"][seed][: one.num_examples], one.examples["x"])
        np.testing.assert_array_equal(stacked.offsets[seed], one.offsets)


@pytest.mark.slow
def test_comparison_reuses_what_is_done(small_setting, tmp_path):
    from rich.console import Console

    setting, plan = small_setting
    plan.rounds, plan.preset = 2, plan.preset._replace(participation=0.06)
    plan.variants = (Variant("one"), Variant("scratch", "scratch"))
    places = files.start_run(tmp_path / "run", plan.config)
    quiet = Console(file=io.StringIO())
    first = Comparison(setting, plan, places, quiet).run()
    stamp = (places.root / "variants" / "one.json").stat().st_mtime_ns
    again = Comparison(setting, plan, places, quiet).run()
    assert (places.root / "variants" / "one.json").stat().st_mtime_ns == stamp
    assert [run["scores"] for run in first["runs"]] == [run["scores"] for run in again["runs"]]
    assert {path.name for path in places.plots.iterdir()} >= {"learning.png", "adaptation.png", "bytes.png"}
    assert (places.root / "report.html").exists() and (places.root / "report.md").exists()


def test_command_line_end_to_end_and_resume(tmp_path):
    program(*SMALL, "--algorithms", "cedar", "scratch", cwd=tmp_path, check=0)
    root = next((tmp_path / "runs").iterdir())
    results = json.loads((root / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["cedar", "scratch"]
    assert np.shape(results["runs"][0]["scores"]) == (2, 3)
    differs = program("--rounds", "5", "--resume", str(root), cwd=tmp_path, check=2)
    assert "rounds must be left out or be 4" in " ".join(differs.stderr.split())
    (root / "results.json").unlink()
    (root / "variants" / "scratch.json").unlink()
    program("--resume", str(root), cwd=tmp_path, check=0)
    again = json.loads((root / "results.json").read_text())
    assert [run["scores"] for run in again["runs"]] == [run["scores"] for run in results["runs"]]


@pytest.mark.slow
def test_interrupted_run_resumes_to_the_same_numbers(tmp_path):
    options = ["--dataset", "digits", "--seeds", "1", "--rounds", "2000", "--algorithms", "cedar", "--adapt-steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(ROOT / ".cache" / "program")}
    command = [sys.executable, "-m", "experiments.cedar", *options]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "digits-001" / "metrics.jsonl"
    for _ in range(2400):
        if log.exists() and log.stat().st_size:
            break
        if process.poll() is not None:
            pytest.fail(f"the program ended early: {process.stdout.read()}")
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            pass
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "--resume runs/digits-001" in out
    program("--resume", "runs/digits-001", cwd=tmp_path, check=0)
    program(*options, "--out", "straight", cwd=tmp_path, check=0)
    resumed, straight = (
        json.loads((tmp_path / name / "digits-001" / "results.json").read_text())["runs"][0]
        for name in ("runs", "straight")
    )
    assert resumed["curve"] == straight["curve"]
    assert resumed["uploaded_bytes"] == straight["uploaded_bytes"]
    records = [files.read_jsonl(tmp_path / name / "digits-001" / "metrics.jsonl") for name in ("runs", "straight")]
    assert records[0] == records[1]


def test_corrupt_checkpoint_is_named_and_kept(small_setting, tmp_path):
    setting, plan = small_setting
    trainer = tiny(setting, plan)
    state = trainer.init()
    checkpoints.save(tmp_path, 1, state)
    checkpoints.save(tmp_path, 2, state)
    broken = [path for path in (tmp_path / "00000002").rglob("*") if path.is_file()]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointError, match=r"00000002.*go on from round 1"):
        checkpoints.restore(tmp_path, state)
    assert (tmp_path / "00000001").is_dir() and (tmp_path / "00000002").is_dir()


def test_only_the_last_checkpoints_are_kept(small_setting, tmp_path):
    for rounds in (1, 2, 3):
        checkpoints.save(tmp_path, rounds, {"x": jax.numpy.ones(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digitz"], "Did you mean 'digits'"),
        (["--dataset", "wisdm", "--data-dir", "/nonexistent"], "/nonexistent"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--dataset", "digits", "--seeds", "0"], "seeds must be at least 1"),
        (["--dataset", "digits", "--budget", "1.5"], "budget must satisfy 0 < budget <= 1, got 1.5"),
        (["--dataset", "digits", "--resume", "nowhere"], "nowhere"),
        (["--dataset", "digits", "--heterogeneity", "rotation"], "heterogeneity is not an option of data set 'digits'"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    from experiments import cedar

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cedar, "use_all_cores", lambda seeds: None)
    monkeypatch.setenv("COLUMNS", "400")
    assert cedar.main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_skipping_too_many_layers_is_named(small_setting):
    setting, plan = small_setting
    with pytest.raises(ValueError, match="num_skipped"):
        tiny(setting, plan, num_skipped=5).init()


def test_budget_below_the_largest_layer_is_named(small_setting):
    setting, plan = small_setting
    with pytest.raises(ValueError, match="block1"):
        tiny(setting, plan, budget=0.1).init()


def test_variants_have_folder_names_of_their_own():
    for suite in SUITES.values():
        names = [slug(variant) for variant in suite()]
        assert len(set(names)) == len(names)


def test_rounds_are_split_without_loss():
    for rounds in (1, 7, 100):
        assert sum(split_rounds(rounds, 10)) == rounds
    assert told_steps(20) == [0, 1, 5, 20] and told_steps(1) == [0, 1] and told_steps(0) == [0]
