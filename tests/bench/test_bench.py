"""The frame of the benchmarks, on programs that take no time; and that the workloads are programs at all."""

import io
import json
import statistics

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from bench import __main__ as program
from bench import machine
from bench.measure import Case, Workload, measure
from bench.workloads import cedar


def square(x):
    return x * x


def small_case(layout="loop", part="whole", units=4):
    return Case(layout, part, square, (jnp.arange(8, dtype=jnp.float32),), units)


def test_every_case_is_timed_as_often_as_asked():
    told = []
    cases = [small_case(), small_case("vmap", units=2)]
    first, second = measure(cases, repeats=5, tell=told.append)
    assert len(first.seconds) == len(first.cpu_seconds) == len(second.seconds) == 5
    assert (first.layout, second.layout, second.units) == ("loop", "vmap", 2)
    assert min(first.seconds) > 0 and first.compile_seconds > 0
    assert first.ms == pytest.approx(1000 * statistics.median(first.seconds) / 4)
    assert first.peak_bytes == 2 * 8 * 4  # eight floats in, eight out
    assert told[0] == "compiling whole, loop" and told[-1] == "turn 5 of 5"


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 5, got 4"):
        measure([small_case()], repeats=4)


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    facts = machine.facts()
    assert facts["cores"] >= 1 and facts["backend"] == "cpu" and len(facts["devices"]) == len(jax.devices())
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    json.dumps(facts)


def test_outside_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.facts()["commit"] is None


@pytest.fixture
def stub(monkeypatch):
    """The workload `cedar`, replaced by one that costs nothing."""
    workload = Workload(
        title="squares",
        unit="client",
        num_clients=(3, 4),
        layouts=lambda count: [small_case("loop", units=count), small_case("vmap", units=count)],
        parts=lambda count, layout: [small_case(layout, "half", count), small_case(layout, "whole", count)],
        goal_ms=0.6,
    )
    monkeypatch.setattr(cedar, "WORKLOAD", workload)


def run(**options):
    out = io.StringIO()
    results = program.run(program.Options(**options), Console(file=out, width=120))
    return results, out.getvalue()


def test_all_sizes_are_measured_and_printed(stub):
    results, text = run(repeats=5)
    assert [result.num_clients for result in results] == [3, 4]
    for result in results:
        assert result.best.ms == min(measurement.ms for measurement in result.layouts)
        assert {part.layout for part in result.parts} == {result.best.layout}
        assert f"cedar: {result.best.ms:.3f} ms a client (goal: 0.6), {result.best.layout}" in text


def test_the_numbers_are_written_as_json(stub, tmp_path):
    path = tmp_path / "new" / "numbers.json"
    (result,), _ = run(workload="cedar", clients=(5,), repeats=5, json=path)
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] == machine.num_cores()
    (record,) = written["results"]
    assert (record["workload"], record["num_clients"]) == ("cedar", 5)
    assert record["best"] == {"layout": result.best.layout, "ms": result.best.ms}
    assert [row["layout"] for row in record["layouts"]] == ["loop", "vmap"]
    assert record["parts"][1]["seconds"] == result.parts[1].seconds
    assert [file.name for file in path.parent.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize(("options", "message"), [({"repeats": 1}, "--repeats"), ({"clients": (0,)}, "--clients")])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"{message} must be at least"):
        run(**options)


@pytest.mark.standard_promotion
def test_cedar_is_the_round_that_it_claims_to_be():
    problem = cedar.problem(3)
    assert sum(leaf.size for leaf in jax.tree.leaves(problem.params)) == 117_706
    by_layout = cedar.by_layout(3)
    names = [case.layout for case in by_layout]
    assert {"loop", "vmap", "chunks of 4", f"mesh of {len(jax.devices())}, loop"} <= set(names)
    parts = {case.part: case for case in cedar.by_part(3, "loop")}
    assert list(parts)[-2:] == [by_layout[0].part, "ten rounds in a scan"]
    case = parts["whole round"]
    state, client_state, info = jax.eval_shape(case.fun, *case.args)
    assert jax.tree.structure(state) == jax.tree.structure(case.args[0])
    assert client_state.scores.shape == info.local.mask.shape == (3, 4)
    assert info.server[0].dropped.shape == (3,)
    assert case.args[1].state.started.all()  # so that a layer is left out
    for case in parts.values():
        jax.eval_shape(case.fun, *case.args)
        assert case.units == (30 if "scan" in case.part else 3)
