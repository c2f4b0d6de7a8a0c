"""The robustness grid: its programs, its log, its worst cases, and what it says of bad input."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from rich.console import Console

import cedarjax as cj
from experiments import files
from experiments.comparison import Interrupted
from experiments.robustness import command, contenders, grid, heatmap, problem, summary
from experiments.robustness.command import Config
from experiments.robustness.grid import Cell

ROOT = Path(__file__).parents[2]
SMALL = dict(rules=("mean", "krum", "bulyan"), attacks=("none", "sign_flip", "label_flip"), fractions=(0.25, 0.4))
SMALL |= dict(alphas=(0.1, 10.0), seeds=2, clients=8, rounds=2)


def quiet():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of a small grid."""
    config = Config(out=tmp_path_factory.mktemp("robustness") / "run", **SMALL)
    return config, command.run(config, quiet())


@pytest.fixture
def copy(small, tmp_path):
    """The same run again, whose log may be tampered with."""
    config, results = small
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (out / name).write_bytes((config.out / name).read_bytes())
    return Config(out=out, **SMALL), results


@pytest.fixture
def calls(monkeypatch):
    """How often a program was compiled and run."""
    counts = {"compile": 0, "run": 0}
    compile_, call = grid.OverSeeds.compile, grid.OverSeeds.__call__

    def counted_compile(self, *args):
        counts["compile"] += self._compiled is None
        compile_(self, *args)

    def counted_call(self, *args):
        counts["run"] += 1
        return call(self, *args)

    monkeypatch.setattr(grid.OverSeeds, "compile", counted_compile)
    monkeypatch.setattr(grid.OverSeeds, "__call__", counted_call)
    return counts


def make(num_clients=6, alphas=(0.3,), num_seeds=1):
    examples = problem.read_examples("digits")
    few = examples._replace(x=examples.x[:240], y=examples.y[:240])
    return problem.make_problem(few, (8,), num_clients=num_clients, alphas=alphas, num_seeds=num_seeds)


# Data and draws.


def test_every_example_goes_to_one_client_and_sizes_are_alike():
    runs = make(7, (0.1, 100.0), 2).runs([2])
    rows, counts = np.asarray(runs.rows), np.asarray(runs.counts)
    assert rows.shape == (4, 7, 35)
    for own, count in zip(rows, counts, strict=True):
        dealt = np.concatenate([r[:c] for r, c in zip(own, count, strict=True)])
        np.testing.assert_array_equal(np.sort(dealt), np.arange(240))
        assert count.max() - count.min() <= 1


def test_small_alphas_leave_few_classes():
    info = make(6, (0.05, 100.0), 2).info["classes per client"]
    assert info["alpha 0.05"] < 6 < 9 < info["alpha 100"]


def test_runs_go_over_fractions_then_alphas_then_seeds():
    runs = make(10, (0.1, 1.0), 3).runs([1, 4])
    byzantine = np.asarray(runs.byzantine).reshape(2, 2, 3, 10)
    assert (byzantine[0].sum(axis=-1) == 1).all() and (byzantine[1].sum(axis=-1) == 4).all()
    assert (byzantine[1] | ~byzantine[0]).all(), "attackers of a small fraction are among those of a larger one"
    assert (byzantine[:, 0] == byzantine[:, 1]).all() and len(np.unique(byzantine[1, 0], axis=0)) > 1
    params, rows = np.asarray(runs.params).reshape(2, 2, 3, -1), np.asarray(runs.rows).reshape(2, 2, 3, -1)
    assert (params[0] == params[1]).all() and (params[:, 0] == params[:, 1]).all() and (rows[0] == rows[1]).all()
    assert (params[0, 0, 0] != params[0, 0, 1]).any() and (rows[0, 0] != rows[0, 1]).any()


def test_digits_are_divided_once_and_for_all():
    one, two = problem.read_examples("digits"), problem.read_examples("digits")
    assert one.x.shape == (1347, 64) and one.test_x.shape == (450, 64) and 0 <= one.x.min() < one.x.max() == 1
    assert len(np.unique(np.concatenate([one.x, one.test_x]), axis=0)) == 1797
    np.testing.assert_array_equal(one.x, two.x)


@pytest.mark.parametrize(
    ("name", "train", "test", "inputs", "classes"),
    [("mnist", 4000, 2000, 784, 10), ("wisdm", 4000, 1584, 153, 6)],
)
def test_real_data_from_files(name, train, test, inputs, classes, shared_data_dir):
    examples = problem.read_examples(name, shared_data_dir)
    assert examples.x.shape == (train, inputs) and examples.test_x.shape[0] >= test
    assert examples.x.dtype == np.float32 and np.isfinite(examples.x).all() and np.abs(examples.x).max() < 20
    assert set(np.unique(examples.y)) == set(np.unique(examples.test_y)) == set(range(classes))


# The program.


def straight(data, setup, rule, attack, flips):
    """The rounds of the first run one after another: no scan, no switch, one step of every client from its own rows."""
    one = jax.tree.map(lambda x: x[0], data.runs([2]))
    examples, params = data.examples, one.params
    num_clients, state = one.counts.shape[0], rule.init(params)
    attack_state, found = attack.init(params), []
    gradient, lie, answer = jax.jit(jax.grad(data.loss_fn)), jax.jit(attack.update), jax.jit(rule.update)
    for _ in range(setup.rounds):
        grads = []
        for client in range(num_clients):
            own = one.rows[client, : int(one.counts[client])]
            y = examples.y[own]
            y = data.num_classes - 1 - y if flips and one.byzantine[client] else y
            grads.append(gradient(params, {"x": examples.x[own], "y": y}, jax.random.key(0)))
        updates = setup.learning_rate * jnp.stack(grads)
        updates, attack_state = lie(updates, cj.take_info(attack_state)[0], params, byzantine=one.byzantine)
        step, state = answer(updates, cj.take_info(state)[0], params)
        params = params - step
        found.append(float((data.apply(params, examples.test_x).argmax(axis=1) == examples.test_y).mean()))
    return found


ATTACKS = ("none", "sign_flip", "label_flip", "alie", "mimic", "optimised_ipm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "trimmed_mean"])
def test_a_program_is_its_rounds_one_after_another(name):
    """A batch of all 40 rows makes a client's work one step of gradient descent, whatever their order."""
    data, setup = make(), problem.SETUPS["digits"]._replace(batch_size=40, rounds=4, learning_rate=2.0)
    rule = contenders.RULES[name].make(2, 1.0)
    run = jax.jit(grid.make_program(data, setup, rule, ATTACKS))
    one = jax.tree.map(lambda x: x[0], data.runs([2]))
    curves = []
    for index, attack in enumerate(ATTACKS):
        accuracy, finite = run(one, (data.examples, jnp.int32(index)))
        alone = optax.with_extra_args_support(contenders.ATTACKS[attack].make(rule))
        want = straight(data, setup, rule, alone, attack == "label_flip")
        np.testing.assert_allclose(accuracy, want, atol=2.5 / 450, err_msg=attack)  # a near tie may fall either way
        assert bool(finite)
        curves.append(tuple(np.asarray(accuracy)))
    assert len(set(curves)) == len(ATTACKS)
    assert run._cache_size() == 1


def test_parameters_that_are_not_finite_are_told():
    data, setup = make(), problem.SETUPS["digits"]._replace(rounds=2)
    broken = optax.chain(cj.robust.mean(), optax.scale(float("nan")))
    run = jax.jit(grid.make_program(data, setup, broken, ("none",)))
    assert not run(jax.tree.map(lambda x: x[0], data.runs([1])), (data.examples, jnp.int32(0)))[1]


def test_one_of_is_the_chosen_one_and_the_states_of_the_others_stay():
    attacks = [optax.identity(), cj.attacks.mimic(), cj.attacks.sign_flip(3.0)]
    updates, flags = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]]), jnp.array([False, False, True])

    @jax.jit
    def chosen(index, state):
        return contenders.one_of(attacks, index).update(updates, state, None, byzantine=flags)

    state = contenders.one_of(attacks, jnp.int32(0)).init(jnp.zeros(2))
    for index, attack in enumerate(attacks):
        alone = optax.with_extra_args_support(attack)
        want, want_state = alone.update(updates, alone.init(jnp.zeros(2)), None, byzantine=flags)
        got, new = chosen(jnp.int32(index), state)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        expected = (*state[:index], want_state, *state[index + 1 :])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, expected)
    assert chosen._cache_size() == 1


@pytest.mark.parametrize("name", contenders.RULES)
@pytest.mark.parametrize("f", [1, 2, 3])
def test_a_rule_is_defined_just_where_the_table_says(name, f):
    rule = contenders.RULES[name]
    fewest = rule.min_clients(f)

    def answer(num_clients):
        made = rule.make(f, 1.0)
        updates = jax.ShapeDtypeStruct((num_clients, 5), jnp.float32)
        params = jnp.zeros(5)
        return jax.eval_shape(
            lambda u: made.update(u, made.init(params), params, key=jax.random.key(0))[0], updates
        ).shape

    assert answer(fewest) == (5,)
    if rule.knows_f:
        with pytest.raises(ValueError):
            answer(fewest - 1)


# The grid.


def test_groups_are_few_programs_and_leave_out_what_is_not_defined():
    small = grid.Grid(("mean", "krum", "bulyan"), ("none",), (0.2, 0.4), (1.0,), 1, 10)
    assert small.groups == (("mean", (0.2, 0.4)), ("krum", (0.2,)))
    wide = grid.Grid(("bulyan", "median"), ("none",), (0.2, 0.4), (1.0,), 1, 40)
    assert wide.groups == (("bulyan", (0.2,)), ("median", (0.2, 0.4)))


@pytest.mark.slow
def test_a_run_has_every_cell_once(small):
    config, results = small
    cells = [(c["rule"], c["fraction"], c["attack"]) for c in results["cells"]]
    defined = [("mean", 0.25), ("mean", 0.4), ("krum", 0.25)]
    assert sorted(cells) == sorted((*pair, attack) for pair in defined for attack in SMALL["attacks"])
    assert all(np.shape(c["accuracy"]) == (2, 2) for c in results["cells"])
    assert results["num_byzantine"] == [2, 3] and results["programs"]["compiled"] == 2
    stored = json.loads((config.out / "results.json").read_text())
    assert stored == files.plain(results)
    scores = summary.accuracies(results)
    none = scores[0, :, 0]
    np.testing.assert_array_equal(none[0], none[1])  # nobody attacks, however many might
    assert np.isnan(scores[2]).all() and np.isnan(scores[1, 1]).all()
    assert ((scores >= 0) & (scores <= 1) | np.isnan(scores)).all()


def test_the_curve_ends_in_the_accuracy(small):
    config, results = small
    for record in files.read_jsonl(config.out / "metrics.jsonl"):
        if record["kind"] == "cell":
            curve = np.array(record["curve"])
            assert curve.shape == (2, 2)
            np.testing.assert_allclose(curve.mean(axis=1), np.mean(record["accuracy"], axis=1), atol=1e-4)


def test_the_worst_case_is_the_lowest_mean_over_seeds(small):
    _, results = small
    lowest = {}
    for cell in results["cells"]:
        for alpha, seeds in zip(results["alphas"], cell["accuracy"], strict=True):
            key, told = (cell["rule"], cell["fraction"], alpha), (sum(seeds) / 2, cell["attack"], seeds)
            lowest[key] = min(lowest.get(key, (2.0, "", [])), told, key=lambda entry: entry[0])
    assert len(results["worst"]) == len(lowest) == 6
    for entry in results["worst"]:
        mean, _, seeds = lowest[entry["rule"], entry["fraction"], entry["alpha"]]
        assert entry["mean"] == pytest.approx(mean) and entry["std"] == pytest.approx(np.std(seeds, ddof=1))
    baseline = [
        np.mean(c["accuracy"], axis=1) for c in results["cells"] if c["rule"] == "mean" and c["attack"] == "none"
    ]
    np.testing.assert_allclose(results["baseline"], baseline[0])


def test_the_same_command_again_runs_nothing(copy, calls):
    config, results = copy
    log = (config.out / "metrics.jsonl").read_bytes()
    again = command.run(config, quiet())
    assert calls == {"compile": 0, "run": 0} and (config.out / "metrics.jsonl").read_bytes() == log
    assert again == results


def test_what_is_missing_is_done_and_the_rest_is_kept(copy, calls):
    """The last line is torn, as by a crash while it was written."""
    config, results = copy
    path = config.out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["attack"] == "label_flip" and json.loads(lines[-1])["rule"] == "krum"
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    again = command.run(config, quiet())
    assert calls == {"compile": 1, "run": 1}
    plain = [{k: v for k, v in cell.items() if k != "seconds"} for cell in results["cells"]]
    assert [{k: v for k, v in cell.items() if k != "seconds"} for cell in again["cells"]] == plain


def test_another_rule_or_attack_adds_to_a_run(copy, calls):
    config, results = copy
    wider = Config(out=config.out, **SMALL | dict(rules=("mean", "median"), attacks=("none", "ipm")))
    again = command.run(wider, quiet())
    # `none` on the mean is there; `ipm` on the mean and both on the median are not.
    assert calls == {"compile": 2, "run": 3}
    assert again["rules"] == ["mean", "median"] and len(again["cells"]) == 8
    kept = [cell for cell in results["cells"] if (cell["rule"], cell["attack"]) == ("mean", "none")]
    assert [cell for cell in again["cells"] if (cell["rule"], cell["attack"]) == ("mean", "none")] == kept
    command.run(config, quiet())
    assert calls == {"compile": 2, "run": 3}


@pytest.mark.parametrize("changed", [dict(rounds=3), dict(seeds=1), dict(alphas=(0.1, 1.0)), dict(radius=2.0)])
def test_another_setting_is_refused_and_nothing_is_touched(copy, changed):
    config, _ = copy
    before = {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    with pytest.raises(files.RunDirError, match="another configuration"):
        command.run(Config(out=config.out, **SMALL | changed), quiet())
    assert {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()} == before


def test_an_interrupt_ends_after_the_attack_that_runs(small, tmp_path, monkeypatch):
    config, results = small
    interrupted = Config(out=tmp_path / "run", **SMALL)
    attack = grid.Runner._attack

    def pressed(self, group, name, *rest):
        attack(self, group, name, *rest)
        if name == "sign_flip":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(grid.Runner, "_attack", pressed)
    console = quiet()
    with pytest.raises(Interrupted, match="after sign flip on mean, 2, 3 of 8 attack"):
        command.run(interrupted, console)
    assert "The same command goes on" in console.file.getvalue()
    records = [r for r in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "cell"]
    assert [Cell(r["rule"], r["fraction"], r["attack"]) for r in records] == [
        Cell("mean", fraction, name) for name in ("none", "sign_flip") for fraction in (0.25, 0.4)
    ]
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(grid.Runner, "_attack", attack)
    resumed = command.run(interrupted, quiet())
    assert [c["accuracy"] for c in resumed["cells"]] == [c["accuracy"] for c in results["cells"]]


# What people read.


def by_hand(**changes):
    accuracy = {
        ("mean", "none"): [[0.9, 0.9]],
        ("mean", "fang"): [[0.1, 0.3]],
        ("krum", "none"): [[0.7, 0.7]],
        ("krum", "fang"): [[0.8, 0.6]],
    }
    cells = [
        {"rule": rule, "attack": attack, "fraction": 0.2, "num_diverged": 0, "accuracy": seeds, "seconds": 1.0}
        for (rule, attack), seeds in accuracy.items()
    ]
    results = {
        "title": "A title",
        "name": "digits",
        "dataset": {"classes": 10, "classes per client": {"alpha 1": 7.5}},
        "config": {"a|b": 1},
        "setup": {},
        "rules": ["mean", "krum", "bulyan"],
        "attacks": ["none", "fang"],
        "fractions": [0.2],
        "alphas": [1.0],
        "num_byzantine": [2],
        "num_clients": 10,
        "rounds": 3,
        "tail": 3,
        "cells": cells,
        "programs": {"compiled": 2, "compile_seconds": 3.0, "run_seconds": 4.0},
        "plots": {"All": "plots/worst.png"},
    } | changes
    return results | {"worst": summary.worst_cases(results), "baseline": summary.baseline(results)}


def test_sentences_name_the_best_and_the_least():
    told = summary.findings(by_hand())
    assert told == ["2 of 10 attack, alpha 1: Krum keeps most, 0.700 (no attack); mean keeps least, 0.200 (Fang*)."]
    alike = by_hand()
    alike["worst"][0] |= {"mean": 0.65, "std": 0.1}
    assert "Krum keeps most, 0.700 (no attack), within the spread of it mean;" in summary.findings(alike)[0]
    broken = by_hand()
    broken["cells"][1]["num_diverged"] = 2
    assert summary.findings(broken)[-1] == "2 runs ended with parameters that are not finite."


def test_tables_hold_the_numbers():
    results, console = by_hand(), quiet()
    text = summary.markdown(results)
    assert "| mean | .200 Fang\\* |" in text and "| Krum | **.700 no attack** |" in text and "| Bulyan | – |" in text
    assert (
        "| mean | .900 ±.000 | .200 ±.141 |" in text and "![All](plots/worst.png)" in text and "| a\\|b | 1 |" in text
    )
    assert "the mean with nobody attacking: 0.900 (alpha 1)" in text
    summary.print_summary(results, console)
    printed = console.file.getvalue()
    assert "2 of 10 clients attack" in printed and ".200 Fang*" in printed and "alpha 1" in printed


def test_without_the_mean_there_is_no_baseline():
    cells = [cell for cell in by_hand()["cells"] if cell["rule"] == "krum"]
    results = by_hand(rules=["krum"], cells=cells)
    assert results["baseline"] is None and "nobody attacking" not in summary.markdown(results)


def test_heat_maps_are_pictures_of_the_numbers(tmp_path):
    results = by_hand()
    heatmap.plot_attacks(tmp_path / "a.png", results, 1.0)
    heatmap.plot_worst(tmp_path / "b.png", results)
    heatmap.plot_worst(tmp_path / "c.png", results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)
    for value in (0.9, 0.2, 0.7):
        color = np.array(heatmap.COLORS(value)[:3])
        assert (np.abs(pixels - color).max(axis=1) < 0.01).sum() > 500
    assert (np.abs(pixels - matplotlib.colors.to_rgb(heatmap.UNDEFINED)).max(axis=1) < 0.01).sum() > 500


def test_files_of_a_run_are_whole_or_old(small, monkeypatch):
    config, _ = small
    names = ("results.json", "report.md", "plots/worst.png", "plots/alpha-0.1.png", "plots/alpha-10.png")
    before = {name: (config.out / name).read_bytes() for name in names}
    assert all(before.values())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        command.run(config, quiet())
    assert {name: (config.out / name).read_bytes() for name in names} == before
    assert not list(config.out.rglob("*.tmp"))


# The command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rules=("krumm",)), r"rules must be among mean, .*got 'krumm'\. Did you mean 'krum'\?"),
        (dict(attacks=("sign-flip",)), r"attacks must be among none, .*Did you mean 'sign_flip'\?"),
        (dict(rules=()), "rules must name at least one of mean"),
        (dict(rules=("mean", "mean")), "rules must differ from each other, got mean, mean"),
        (dict(fractions=(0.5,)), r"fractions must be above 0 and below 0\.5.*got 0\.5"),
        (dict(fractions=(0.01,)), r"at least one and less than half of the 20 clients, got 0\.01"),
        (dict(fractions=(0.1, 0.11)), r"different numbers of attackers, got \(0\.1, 0\.11\): \[2, 2\]"),
        (dict(fractions=()), "fractions must be at least one number"),
        (dict(alphas=(1.0, 1.0)), "alphas must be at least one number, all different"),
        (dict(alphas=(0.0,)), r"alphas must be above 0 and finite, got 0\.0"),
        (dict(seeds=0), "seeds must be at least 1, got 0"),
        (dict(clients=2), "clients must be at least 3, got 2"),
        (dict(rounds=0), "rounds must be above 0 and finite, got 0"),
        (dict(learning_rate=float("nan")), "learning_rate must be above 0 and finite, got nan"),
        (dict(radius=-1.0), r"radius must be above 0 and finite, got -1\.0"),
        (dict(rules=("bulyan",), fractions=(0.3,)), "rules must hold one that is defined for 20 clients"),
        (dict(clients=5000, rules=("mean",)), "num_clients"),
    ],
)
def test_options_say_what_is_allowed(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.run(Config(out=tmp_path / "run", **options), quiet())
    assert not (tmp_path / "run").exists()


def test_full_and_default_grids_are_allowed():
    default, full = Config().grid, Config(full=True).grid
    assert set(default.rules) < set(full.rules) == set(contenders.RULES) and default.attacks == full.attacks
    assert Config(full=True, seeds=1, rules=("mean",)).grid.rules == ("mean",)
    assert Config(full=True).folder != Config().folder


def test_unknown_data_and_absent_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="dataset must be one of digits, mnist, wisdm, got 'iris'"):
        problem.read_examples("iris")
    with pytest.raises(FileNotFoundError, match="mnist"):
        problem.read_examples("mnist", tmp_path)


def test_mistakes_end_the_command_with_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "use_all_cores", lambda count: None)
    assert command.main(["--fractions", "0.7"]) == 2
    assert "fractions must be above 0" in capsys.readouterr().err
    assert command.main(["--dataset", "wisdm", "--data-dir", str(tmp_path)]) == 2
    assert "wisdm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path):
    arguments = "--rules mean --attacks none alie --fractions 0.25 --alphas 1 --seeds 1 --clients 4 --rounds 2".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(ROOT / ".cache" / "program")}
    line = [sys.executable, "-m", "experiments.robustness", *arguments]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "robustness-digits"
    assert "1 of 4 clients attack" in done.stdout and "runs/robustness-digits/report.md" in done.stdout
    assert len(json.loads((root / "results.json").read_text())["cells"]) == 2
    assert sorted(path.name for path in (root / "plots").iterdir()) == ["alpha-1.png", "worst.png"]
