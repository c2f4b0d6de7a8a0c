"""What uploads give away, in small: who is attacked, what is sent, and that what is done is not done again."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from cedarjax import privacy
from experiments.leakage import attack, command, contenders, pictures, problem, summary

pytestmark = pytest.mark.standard_promotion


def config(*rows, **options):
    given = dict(seeds=1, victims=2, steps=3, model="mlp")
    return command.Config(**{**given, **options}, rows=rows or None)


def made(model, **options):
    given = dict(num_seeds=1, num_victims=2, rate=0.1, warm_up=0)
    return problem.make_problem("digits", None, model, **{**given, **options})[0]


@pytest.fixture(scope="module")
def small():
    """MLPs of one seed, which are quick to compile."""
    return made("mlp")


def uploads_of(p, one, work=None):
    return jax.jit(lambda one: p.uploads(one, work or problem.Work()))(one)


def sent_of(row, *args):
    return jax.jit(functools.partial(attack.sent_by, row))(*args).sent


@pytest.fixture(scope="module")
def first(small):
    return jax.tree.map(lambda x: x[0], small.victims)


def test_victims_own_their_pictures_alone(first):
    own, public = np.asarray(first.x).reshape(-1, 784), np.asarray(first.public).reshape(-1, 784)
    both = np.concatenate([own, public])
    assert len(np.unique(both, axis=0)) >= len(both) - 2  # the data set itself may hold a picture twice
    assert both.min() >= 0 and both.max() <= 1 and own.shape == (2 * problem.MOST_ROWS, 784)


def test_a_sum_is_the_mean_of_its_clients_and_a_batch_is_one_gradient(small, first):
    gradient = jax.jit(jax.grad(small.loss_fn))
    one = [
        gradient(first.params, {"x": first.x[0, i : i + 1], "y": first.y[0, i : i + 1]}, first.keys[0])
        for i in range(4)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *one)
    for work in (problem.Work(num_clients=4), problem.Work(num_images=4, batch_size=4)):
        uploads = jax.tree.map(lambda x: x[0], uploads_of(small, first, work))
        for a, b in zip(jax.tree.leaves(uploads), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_local_steps_are_those_of_a_client(small, first):
    work = problem.Work(num_images=4, batch_size=2)
    data = problem.cj.ClientData({"x": first.x[1, :4], "y": first.y[1, :4]}, jnp.int32(4), jnp.int32(4))
    delta = jax.jit(lambda: small.local(work).update(first.params, (), data, first.keys[1])[0].delta)()
    uploads = jax.tree.map(lambda x: x[1], uploads_of(small, first, work))
    for a, b in zip(jax.tree.leaves(uploads), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(a * small.rate, b, rtol=1e-4, atol=1e-7)


def test_what_was_not_sent_is_not_observed(small, first):
    rows = command.table_of(small)
    uploads = uploads_of(small, first)
    for name, share in (("without_block1", None), ("only_head", None), ("top_1", 0.01)):
        sent = sent_of(rows[name], first, uploads, None)
        for seen, mask, true in zip(*map(jax.tree.leaves, (sent.observed, sent.mask, uploads)), strict=True):
            np.testing.assert_array_equal(seen, np.where(mask, true, 0))
        if share is None:
            kept = {layer for layer, part in sent.mask.items() if np.asarray(part["kernel"]).all()}
            assert kept == ({"head"} if name == "only_head" else {"block2", "block3", "block4", "head"})
        else:
            counts = [np.asarray(leaf)[0] for leaf in jax.tree.leaves(sent.mask)]
            assert sum(c.sum() for c in counts) <= share * sum(c.size for c in counts) + len(counts)


def test_cedar_leaves_out_what_its_rule_says(small, first):
    run = jax.jit(functools.partial(attack.uploaded, small, problem.Work(), {"num_skipped": 1}))
    one, uploads, masks = run(first)
    sent = sent_of(command.table_of(small)["cedar"], one, uploads, masks)
    away = [layer for layer, part in sent.mask.items() if not np.asarray(part["kernel"][0]).any()]
    assert len(away) == 1 and away[0] != "head"
    assert np.abs(np.asarray(one.params["head"]["kernel"] - first.params["head"]["kernel"])).max() > 0


def test_noise_has_the_length_that_its_epsilon_asks_for():
    pytest.importorskip("dp_accounting")
    for epsilon in (1.0, 10.0):
        multiplier = 2 * contenders.gaussian_multiplier(epsilon, 1e-5)
        accounted = privacy.local_epsilon(noise_multiplier=multiplier, num_reports=1, delta=1e-5)
        assert accounted == pytest.approx(epsilon, rel=2e-3)
    upload = {"a": jnp.full(20_000, 0.1)}
    sent = contenders.noised(10.0)(upload, jax.random.key(0), jnp.float32(2.0))
    clipped = 0.1 * 2 / (0.1 * 20_000**0.5)
    assert np.std(np.asarray(sent.observed["a"]) - clipped) == pytest.approx(multiplier * 2, rel=0.02)


def test_scores_know_the_picture_from_others(first):
    truth = {"x": first.x[0, :2], "y": first.y[0, :2]}
    told = jax.jit(pictures.score)(truth["x"][::-1] * 0.5, truth["y"][::-1], truth, first.public)
    assert told.recognised == 1 and told.label_accuracy == 1 and told.ssim > 0.5
    np.testing.assert_allclose(told.picture, 0.5 * truth["x"][0, ..., 0])
    lost = jax.jit(pictures.score)(first.public[:2], truth["y"], truth, first.public)
    assert lost.recognised == 0


def test_public_pictures_span_a_space_that_holds_them(first):
    space = jax.jit(pictures.picture_space)(first.public)
    flat = np.asarray(space.components).reshape(pictures.NUM_COMPONENTS, -1)
    sizes = (flat**2).sum(axis=1)
    np.testing.assert_allclose(flat @ flat.T, np.diag(sizes), atol=1e-3 * sizes.max())
    centred = (np.asarray(first.public) - np.asarray(space.mean)).reshape(len(first.public), -1)
    z = centred @ flat.T / sizes
    np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-2)
    left = centred - z @ flat
    assert (left**2).sum() < 0.1 * (centred**2).sum()


@pytest.mark.slow
def test_a_run_is_told_and_resumed(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    results = command.run(config("full", "only_head", out=tmp_path / "run"), console)
    printed = console.file.getvalue()
    assert all(name in printed for name in ("blind guess", "whole upload", "head alone"))
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    for name in ("report.md", "plots/pictures.png", "plots/psnr.png"):
        assert (tmp_path / "run" / name).stat().st_size > 300
    by_key = {record["key"]: record for record in results["runs"]}
    assert list(by_key) == ["blind", "full", "only_head"]
    # The first layer is fully connected: read off, the picture is exact, and the label is the bias's.
    exact = summary.best(by_key["full"])
    assert exact["attacker"] == "read off" and np.min(exact["psnr"]) > 50 and np.min(exact["label_accuracy"]) == 1
    assert by_key["full"]["sent"] == 1 and np.shape(exact["psnr"]) == (1, 2)
    shown = pictures.unpack_pictures(exact["shown"], problem.SIDE)
    np.testing.assert_allclose(shown, pictures.unpack_pictures(results["true"], problem.SIDE), atol=2 / 255)
    assert by_key["only_head"]["sent"] < 0.1
    names = [f"{attacker}, direction" for attacker in attack.ATTACKERS]
    assert [a["attacker"] for a in by_key["full"]["attackers"]] == [*names, "read off"]
    assert [a["attacker"] for a in by_key["only_head"]["attackers"]] == names

    def refuse(*args):
        raise AssertionError("what is done is not done again")

    monkeypatch.setattr(attack.Attacks, "run", refuse)
    again = command.run(config("only_head", out=tmp_path / "run"), console)
    assert again["runs"][1] == by_key["only_head"]
    with pytest.raises(Exception, match="steps"):
        command.run(config("full", steps=4, out=tmp_path / "run"), console)


@pytest.mark.slow
def test_matching_works_on_the_smooth_model():
    """A few hundred steps on one whole upload: far above a blind guess."""
    p = made("lenet", num_victims=1)
    rows = command.table_of(p)
    record = attack.Attacks(p, 150).run("full", rows["full"])
    blind = attack.blind(p)
    assert np.mean(summary.best(record, may_know=False)["psnr"]) > 20 > np.mean(summary.best(blind)["psnr"]) + 3
    assert summary.best(record)["label_accuracy"] == [[1.0]] and summary.best(record)["recognised"] == [[1.0]]


def test_a_model_that_was_trained_is_another(first):
    trained = made("mlp", warm_up=3).victims
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a[0] - b).max()), trained.params, first.params)
    assert 0 < moved["head"]["bias"] < 0.01
    np.testing.assert_array_equal(trained.x[0], first.x)


def test_the_best_attacker_is_chosen_with_and_without_public_pictures():
    record = {"attackers": [{"attacker": "smooth", "psnr": [[1.0, 3.0]]}, {"attacker": "public", "psnr": [[2.0, 9.0]]}]}
    assert summary.best(record)["attacker"] == "public" and summary.best(record, may_know=False)["attacker"] == "smooth"


def test_pictures_are_read_off_where_the_first_layer_was_sent():
    def scores(value):
        shapes = pictures.Scores._fields
        leaves = {name: np.full((1, 2, 3, 3) if name == "picture" else (1, 2), value) for name in shapes}
        return pictures.Scores(**leaves)

    searched, read = {"public, direction": scores(1.0)}, scores(2.0)
    found = attack.or_read_off(searched, read, np.array([[True, False]]))
    assert list(found) == ["public, direction, or read off"]
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf[:, 0], 2.0)
        np.testing.assert_array_equal(leaf[:, 1], 1.0)
    assert attack.or_read_off(searched, read, np.array([[True, True]])) == {"read off": read}
    assert attack.or_read_off(searched, read, np.array([[False, False]])) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"victims": 0}, "victims must be at least 1, got 0"),
        ({"warm_up": -1}, "warm_up must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options).check()


def test_other_data_and_other_rows_are_refused(tmp_path):
    console = Console(file=io.StringIO())
    with pytest.raises(
        ValueError, match="square grey pictures with shared classes, such as digits, got 'synthetic-iot'"
    ):
        command.run(config(dataset="synthetic-iot", out=tmp_path), console)
    with pytest.raises(ValueError, match="rows must be among .* got 'ful'"):
        command.run(config("ful", out=tmp_path), console)
    with pytest.raises(ValueError, match="at least 3600 pictures for 200 victims"):
        command.run(config(victims=200, out=tmp_path), console)
