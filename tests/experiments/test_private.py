"""Accuracy beside epsilon, in small."""

import io
import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

import cedarjax as cj
from cedarjax.privacy import accounting
from experiments import evaluation
from experiments.private import command, contenders, problem, program, summary

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.standard_promotion

SMALL = problem.Preset(rounds=3, participation=0.5, hidden=(4, 4), rate=0.3)


def config(*algorithms, **options):
    given = dict(num_clients=12, seeds=2, rounds=2, participation=1.0, epsilons=(5.0,))
    return command.Config(**{**given, **options}, algorithms=algorithms)


def test_many_tasks_have_private_orders_and_images_of_their_own_pool():
    federation = problem.many_tasks(30, seed=1)
    assert len(federation.train_clients) == 30 and federation.num_outputs == problem.NUM_WAYS
    rows = problem.NUM_WAYS * (problem.TRAIN_SHOTS + problem.NUM_QUERY)
    assert (np.bincount(federation.client_id)[federation.train_clients] == rows).all()
    roles = federation.role[federation.client_id]
    seen = [{x.tobytes() for x in federation.x[roles == role]} for role in (0, 1, 2)]
    assert not seen[0] & seen[2] and not seen[0] & seen[1] and not seen[1] & seen[2]
    np.testing.assert_array_equal(problem.many_tasks(30, seed=1).y, federation.y)


def test_budgets_begin_without_a_promise_and_end_with_the_least():
    rows = program.budgets((1.0, 8.0))
    assert [row.epsilon for row in rows] == [math.inf, math.inf, 8.0, 1.0]
    assert [row.clips for row in rows] == [False, True, True, True]
    assert len({row.key for row in rows}) == 4


def test_a_plan_keeps_its_budget():
    everybody = SMALL._replace(participation=1.0)
    plan = program.make_plan(program.budgets((2.0,))[-1], 50, everybody, 1e-2, None)
    assert 2.0 * (1 - 1e-3) < plan.epsilon <= 2.0
    told = accounting.epsilon(sampling_rate=1.0, noise_multiplier=plan.noise_multiplier, num_rounds=3, delta=1e-2)
    assert plan.epsilon == told


def test_a_plan_has_places_enough():
    plan = program.make_plan(program.budgets(())[1], 50, SMALL, 1e-2, 1.0)
    assert plan.selector.sampling.probability == 0.5 and plan.expected_cohort == 25
    assert 0 < plan.overflow_probability <= 1e-4 and plan.epsilon == math.inf


@pytest.mark.slow
def test_a_run_is_told_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RATES", {"sgd": (0.1,)})
    out, console = tmp_path / "run", Console(file=io.StringIO(), width=240)
    results = command.run(config("fedavg", out=out), console)
    printed = console.file.getvalue()
    assert "FedAvg" in printed and "epsilon 5" in printed
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "plots/epsilon.png").stat().st_size > 0
    assert "adding or removing one of 12" in (out / "report.md").read_text()
    runs = results["runs"]
    assert [run["budget"] for run in runs] == ["not private", "clipped, no noise", "epsilon 5"]
    assert all(np.shape(run["scores"]) == (2, 4) and np.isfinite(run["scores"]).all() for run in runs)
    assert [run["epsilon"] is None for run in runs] == [True, True, False]
    assert 4.9 < runs[2]["epsilon"] <= 5.0 and runs[2]["noise_multiplier"] > 0
    assert all(0 <= run["clipped"] <= 1 and run["max_norm"] > 0 for run in runs[1:])
    assert runs[0]["clipped"] is None and runs[0]["max_norm"] is None

    monkeypatch.setattr(command, "contend", None)  # nothing is done twice
    again = command.run(config("fedavg", epsilons=(), out=out), Console(file=io.StringIO()))
    assert again["runs"] == runs[:2]
    with pytest.raises(command.files.RunDirError, match="rounds"):
        command.run(config("fedavg", rounds=4, out=out), console)


@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_every_algorithm_runs_under_every_plan(name):
    setting = problem.make_problem("digits", 6, range(1), SMALL)
    local = contenders.CONTENDERS[name].make(setting, SMALL, setting.stimuli[0])
    plan = program.make_plan(program.budgets(())[1], 6, SMALL._replace(participation=1.0), 1e-2, None)
    algorithm = cj.federated_round(local, plan.aggregator)
    params, dataset = jax.tree.map(lambda x: x[0], (setting.params, setting.train))
    state = jax.eval_shape(lambda: cj.init_run(algorithm, dataset, params, selector=plan.selector))
    after, history, _ = jax.eval_shape(
        lambda state: cj.run_rounds(algorithm, dataset, state, setting.keys[0], num_rounds=2, selector=plan.selector),
        state,
    )
    assert after == state and history.info.server[0].max_norm.shape == (2,)


def test_the_table_says_who_loses_what():
    run = {"algorithm": "A", "noise_multiplier": 0.0, "max_norm": None, "clipped": None, "noise_to_norm": 0.0}
    results = {
        "metric": "accuracy",
        "steps": [0, 5],
        "delta": 1e-3,
        "num_clients": 9,
        "runs": [
            {**run, "budget": "not private", "epsilon": None, "scores": [[0.2, 0.8], [0.4, 0.9]]},
            {**run, "budget": "epsilon 3", "epsilon": 2.995, "scores": [[0.2, 0.6], [0.2, 0.6]], "max_norm": 0.5},
        ],
    }
    told = summary.rows(results)
    assert told[0][:3] == ["A", "not private", "∞"] and told[0][5] == "0.850 ±0.071"
    assert told[1][2] == "3.00" and told[1][6] == "0.50" and len(told[0]) == len(summary.header(results))
    assert summary.findings(results) == ["A after 5 steps: not private 0.850; epsilon 3 0.600 (-0.250)."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"participation": 1.5}, "participation must satisfy 0 < participation <= 1, got 1.5"),
        ({"epsilons": (1.0, 0.0)}, "epsilons must be above 0"),
    ],
)
def test_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        config("fedavg", **options).check()
    with pytest.raises(ValueError, match="algorithms must be among .*Did you mean 'cedar'"):
        config("ceder").check()


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "use_all_cores", lambda seeds: None)  # devices cannot change once there are some
    assert command.main(["--algorithms", "fedavg", "--rounds", "-1", "--out", str(tmp_path / "x")]) == 2
    assert "rounds must be at least 1" in capsys.readouterr().err
