"""What clients can send in place of everything, in small."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

import cedarjax as cj
from experiments.bytes import command, contenders, program, summary

pytestmark = pytest.mark.standard_promotion


def config(*algorithms, **options):
    given = dict(seeds=1, rounds=4, points=2, participation=0.1, hidden=(8, 8, 8))
    return command.Config(**{**given, **options}, algorithms=algorithms or None)


@pytest.fixture(scope="module")
def problem():
    return config().problem()


QUICK = ("fedavg", "cedar2", "drive", "powersgd_mean", "fetchsgd", "cedar_top_k1")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in contenders.CONTENDERS]


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_is_ready_for_a_round(name, problem):
    recipe = contenders.CONTENDERS[name].make(problem, 0.1)
    algorithm = cj.federated_round(recipe.local, recipe.server)
    params = jax.tree.map(lambda x: x[0], problem.setting.params)
    train = jax.tree.map(lambda x: x[0], problem.setting.train)

    def one_round():
        cohort = cj.core.sample_cohort(jax.random.key(0), train, problem.cohort)
        one = algorithm.init_client(params)
        state = jax.tree.map(lambda x: jax.numpy.broadcast_to(x, (problem.cohort, *jax.numpy.shape(x))), one)
        after, _, info = algorithm.step(algorithm.init(params), cohort._replace(state=state), jax.random.key(1))
        return after.params, recipe.sent if isinstance(recipe.sent, int) else recipe.sent(info.local)

    after, sent = jax.eval_shape(one_round)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, params)
    assert sent.shape in ((), (problem.cohort,))


def test_what_is_sent_is_counted(problem):
    """FedAvg sends everything; one entry in ten is a value of 32 bits and an index for the length of its leaf."""
    sizes = [x.size for x in jax.tree.leaves(problem.params)]
    full = program.train(problem, contenders.CONTENDERS["fedavg"])
    assert (np.asarray(full.sent) == 4 * sum(sizes)).all() and full.accuracy.shape == (len(contenders.RATES), 1, 2)
    sparse = program.train(problem, contenders.CONTENDERS["top_k10"])
    bits = sum(max(1, round(0.1 * size)) * (32 + int(np.ceil(np.log2(size)))) for size in sizes)
    assert abs(int(np.asarray(sparse.sent).max()) - bits / 8) <= 8 * len(sizes)  # how k is rounded
    assert (np.asarray(sparse.sent) == np.asarray(sparse.sent).flat[0]).all()


def test_a_run_is_told_and_resumed(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    results = command.run(config("fedavg", "cedar_uniform4", out=tmp_path / "run"), console)
    printed = console.file.getvalue()
    assert all(contenders.CONTENDERS[name].label in printed for name in ("fedavg", "cedar_uniform4"))
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    for name in ("report.md", "plots/front.png", "plots/curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 300
    fedavg, filtered = results["runs"]
    assert summary.final(fedavg)[0] == fedavg["full_bytes"] > 6 * summary.final(filtered)[0]

    def refuse(*args):
        raise AssertionError("what is done is not done again")

    monkeypatch.setattr(command, "contend", refuse)
    assert command.run(config("fedavg", "cedar_uniform4", out=tmp_path / "run"), console) == results


def test_the_front_holds_those_that_nobody_beats():
    def record(key, sent, score):
        return {"key": key, "uploaded": [[sent, 2 * sent]], "accuracy": [[0.0, score]]}

    records = [record("much", 9, 0.9), record("less", 5, 0.9), record("little", 1, 0.2), record("worse", 2, 0.1)]
    assert summary.front(records) == ["little", "less"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 5}, "points must divide the rounds, got 2 and 5"),
        ({"participation": 0.0}, "participation must be above 0 and at most 1, got 0.0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.run(config("fedavg", out=tmp_path / "run", **options), Console(file=io.StringIO()))


def test_data_without_common_classes_are_refused(monkeypatch):
    private = config().load(0)._replace(class_names=None)
    monkeypatch.setattr(command.Config, "load", lambda self, seed: private)
    with pytest.raises(ValueError, match="dataset must have classes that all clients share, got digits"):
        config().problem()


def test_an_unknown_contender_is_named(tmp_path):
    with pytest.raises(ValueError, match="algorithms must be among .* got 'top1'"):
        command.run(config("top1", out=tmp_path / "run"), Console(file=io.StringIO()))
