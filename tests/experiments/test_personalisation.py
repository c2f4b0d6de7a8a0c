"""The comparison of personalised algorithms, in small."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import datasets, setting
from experiments.datasets import TRAIN
from experiments.evaluation import RATES
from experiments.personalisation import command, contenders, problem, program, tournament
from experiments.personalisation.problem import hold_back
from experiments.setting import DEFAULT

pytestmark = pytest.mark.standard_promotion


def console():
    return Console(file=io.StringIO(), width=200)


def load(seed):
    return datasets.load("synthetic-iot", size="small", seed=seed)


@pytest.fixture(scope="module")
def small():
    preset = DEFAULT._replace(rounds=2, participation=0.2, hidden=(6,))
    return problem.make_problem(load, (0, 1), preset)


def test_rows_held_back_are_nobody_elses():
    federation = load(3)
    kept, own = hold_back(federation, 3)
    whole = datasets.to_dataset(federation, TRAIN)
    train = datasets.to_dataset(kept, TRAIN)
    assert own.num_clients == train.num_clients == whole.num_clients
    assert own.num_examples == whole.num_examples
    np.testing.assert_array_equal(own.num_support, train.counts)
    np.testing.assert_array_equal(train.num_support, whole.num_support)
    for client in range(own.num_clients):
        start, end = own.offsets[client : client + 2]
        split = start + own.num_support[client]
        rows = np.asarray(own.examples["x"])
        a, b = train.offsets[client : client + 2]
        np.testing.assert_array_equal(rows[start:split], train.examples["x"][a:b])
        share = (end - split) / (end - start)
        assert end > split and abs(share - problem.TEST_SHARE) < 0.05
        assert train.counts[client] > train.num_support[client]
        both = np.sort(np.concatenate([rows[start:split], rows[split:end]]), axis=0)
        i, j = whole.offsets[client : client + 2]
        np.testing.assert_array_equal(both, np.sort(np.asarray(whole.examples["x"][i:j]), axis=0))
    new = federation.role[federation.client_id] != TRAIN
    np.testing.assert_array_equal(federation.x[new], kept.x[kept.role[kept.client_id] != TRAIN])


def test_everybody_has_a_grid_of_one_size():
    assert len({len(contender.rates) for contender in contenders.CONTENDERS.values()}) == 1
    assert all(len(set(c.rates)) == len(c.rates) for c in contenders.CONTENDERS.values())
    labels = [contender.label for contender in contenders.CONTENDERS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, "auto"])
def test_scores_do_not_depend_on_how_clients_are_laid_out(chunk_size, small, monkeypatch):
    def score():
        trained = program.untrained(small)
        scorer = program.Scorer(small.setting)
        return scorer(trained.newcomer, small.setting.new, "sgd", 0.1, 2, (0, 2), one_for_all=True)

    in_turn = score()
    monkeypatch.setattr(program, "side_by_side", lambda: chunk_size)
    for a, b in zip(score(), in_turn, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "fits"), [((11,), "mlp"), ((100, 3), "cnn1d"), ((28, 28, 1), "cnn"), ((3, 4, 5), "mlp")]
)
def test_the_model_fits_the_inputs(shape, fits):
    assert setting.fitting(shape) == fits


def test_a_model_by_name():
    federation = load(0)
    assert set(setting.make_model(federation, (6,), "mlp").init(jax.random.key(0))) == {"block1", "head"}
    with pytest.raises(ValueError, match=r"model must be 'mlp' or fit inputs of shape \(\d+,.*\), got 'cnn'"):
        setting.make_model(federation, (6,), "cnn")


@pytest.mark.parametrize("name", [n for n, c in contenders.CONTENDERS.items() if not c.needs_classes])
def test_a_contender_is_well_made(name, small):
    contender = contenders.CONTENDERS[name]
    one = jax.tree.map(lambda x: x[0], small.setting.params)
    recipe = contender.make(small, 0.1)
    shared = recipe.local.share(one)
    model = recipe.local.model(shared, recipe.local.init(one))
    assert jax.tree.structure(model) == jax.tree.structure(one)
    assert program.shared_bytes(small, contender) == sum(x.nbytes for x in jax.tree.leaves(shared))


def test_rates_and_seeds_are_runs_of_their_own(small):
    """What one program trains for all rates is what a program of one rate trains."""
    both = contenders.CONTENDERS["fedavg"]._replace(rates=(0.1, 0.5))
    alone = both._replace(rates=(0.5,))
    trained, single = program.train(small, both), program.train(small, alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-5, atol=1e-6), trained.newcomer, single.newcomer
    )
    leaf = jax.tree.leaves(trained.newcomer)[0]
    assert not np.allclose(leaf[0], leaf[1]) and not np.allclose(leaf[0, 0], leaf[0, 1])
    np.testing.assert_array_equal(jax.tree.leaves(trained.own)[0][1, 0, 3], leaf[1, 0])


def test_the_best_on_validation_clients_is_chosen(small):
    trained = program.train(small, contenders.CONTENDERS["fedavg"]._replace(rates=(0.1, 0.3)))

    def scorer(models, dataset, optimiser, rate, num_steps, told, *, one_for_all):
        assert models is trained.newcomer and dataset is small.setting.validation and one_for_all
        assert (num_steps, told) == (7, (1, 5, 7))
        scores = np.zeros((2, 2, 3))
        scores[1] = rate if optimiser == "adam" else 0.0
        return scores, None

    best = tournament.choose(small, scorer, trained, 7)
    assert best.place == 1 and best.adaptation == ("adam", max(RATES["adam"]))
    np.testing.assert_allclose(best.score, max(RATES["adam"]))


@pytest.mark.slow
def test_the_command_end_to_end_and_on_again(tmp_path, monkeypatch):
    def config(*names):
        return command.Config(
            dataset="digits", algorithms=names, seeds=1, rounds=2, steps=2, participation=0.2, out=tmp_path / "run"
        )

    monkeypatch.setattr(tournament, "RATES", {"sgd": (0.3,)})
    results = command.run(config("scratch", "fedper"), console())
    stored = json.loads((tmp_path / "run/results.json").read_text())
    assert [run["name"] for run in stored["runs"]] == ["no training", "FedPer"]
    assert np.shape(stored["runs"][1]["scores"]) == (1, 3) and np.shape(stored["runs"][1]["own_curve"]) == (1, 3)
    for name in (
        "report.html",
        "report.md",
        "plots/standing.png",
        "plots/new.png",
        "plots/clients.png",
        "plots/own.png",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 1000

    def refuse(*args):
        raise AssertionError("what is done is not done again")

    with monkeypatch.context() as patch:
        patch.setattr(tournament, "train", refuse)
        again = command.run(config("fedper"), console())
        assert again["runs"] == [results["runs"][1]]
    with pytest.raises(Exception, match="steps"):
        command.run(command.Config(dataset="digits", seeds=1, rounds=2, steps=3, out=tmp_path / "run"), console())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"participation": 1.5}, "participation must be above 0 and at most 1, got 1.5"),
        ({"inner_rate": 0.0}, "inner_rate must be above 0, got 0.0"),
        ({"algorithms": ("fedawg",)}, "Did you mean 'fedavg'"),
        ({"algorithms": ("fedavg", "fedavg")}, "algorithms must differ from each other"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        command.Config(**options).check()
