"""The frame of the benchmarks, on programs that take no time; and that the workloads are programs at all."""

import io
import json
import statistics

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from bench import __main__ as program
from bench import floor, machine, measure
from bench.measure import Case, Workload
from bench.workloads import cedar

CEILINGS = floor.Ceilings(operations=2e6, bytes=1e6)


def square(x):
    return x * x


def small_case(layout="loop", part="whole", units=4, **more):
    return Case(layout, part, square, (jnp.arange(8, dtype=jnp.float32),), units, **more)


def test_every_case_is_timed_as_often_as_asked():
    told = []
    cases = [small_case(), small_case("vmap", units=2)]
    first, second = measure.measure(cases, repeats=5, tell=told.append)
    assert len(first.seconds) == len(first.cpu_seconds) == len(second.seconds) == 5
    assert (first.layout, second.layout, second.units) == ("loop", "vmap", 2)
    assert min(first.seconds) > 0 and first.compile_seconds > 0
    assert first.ms == pytest.approx(1000 * statistics.median(first.seconds) / 4)
    assert first.peak_bytes == 2 * 8 * 4  # eight floats in, eight out
    assert told[0] == "compiling whole, loop" and told[-1] == "turn 5 of 5"


def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 5, got 4"):
        measure.measure([small_case()], repeats=4)


def test_the_floor_is_the_slower_of_operations_and_bytes():
    cases = [small_case(work=floor.Work(*work)) for work in ((4.0, 1.0), (1.0, 4.0))]
    by_operations, by_bytes, uncounted = measure.measure([*cases, small_case()], repeats=5, ceilings=CEILINGS)
    assert (by_operations.floor_seconds, by_bytes.floor_seconds) == pytest.approx((2e-6, 4e-6))
    assert by_bytes.ratio == pytest.approx(statistics.median(by_bytes.seconds) / 4e-6)
    assert uncounted.floor_seconds is uncounted.ratio is None


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 50)

    def repeated(x):
        return jnp.tile(x, 8)

    cases = [small_case(), Case("vmap", "whole", repeated, (jnp.zeros(8),), 1)]
    small, large = measure.measure(cases, repeats=5)
    assert small.skipped is None and len(small.seconds) == 5
    assert large.skipped == "needs 0.0 GiB of 0.0" and large.seconds == []
    assert large.ms == large.cpu_ms == float("inf") and large.peak_bytes == 9 * 8 * 4
    assert measure.fastest([large, small]) == [small]


def test_an_error_while_compiling_is_an_error():
    def wrong(x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        measure.build(Case("loop", "whole", wrong, (jnp.zeros(2),), 1))


def test_the_fastest_is_found_on_one_device_and_on_several():
    one, other, many = measure.measure([small_case(), small_case(), small_case(num_devices=2)], repeats=5)
    first, second, third = (m._replace(seconds=[s]) for m, s in ((one, 3.0), (other, 2.0), (many, 1.0)))
    assert measure.fastest([first, second, third]) == [third, second]


def test_turns_are_shared_out():
    called = []
    samples = measure.take_turns([lambda: called.append("a"), lambda: len(called)], repeats=5)
    assert called == ["a", "a"] * 6
    assert samples == [[None] * 5, [4, 6, 8, 10, 12]]


def test_a_long_call_is_not_repeated(monkeypatch):
    monkeypatch.setattr(measure, "LONG_SECONDS", -1.0)
    called = []
    assert measure.take_turns([lambda: called.append("a")], repeats=5) == [[None] * 5]
    assert len(called) == 1 + 5


def test_what_takes_too_long_sits_out_once_it_has_two_samples():
    called = []
    samples = measure.take_turns([lambda: called.append("a")], repeats=5, most_seconds=0.0)
    assert samples == [[None] * measure.LEAST_SAMPLES] and len(called) == 2 * (1 + measure.LEAST_SAMPLES)
    (measurement,) = measure.measure([small_case()], repeats=5, most_seconds=0.0)
    assert len(measurement.seconds) == measure.LEAST_SAMPLES


def test_temporaries_stand_beside_the_arguments():
    def sorted_twice(x):
        return jnp.sort(jnp.sort(x) * x)

    (measurement,) = measure.measure([Case("loop", "whole", sorted_twice, (jnp.zeros(1000),), 1)], repeats=5)
    assert measurement.argument_bytes == 4000
    assert measurement.temp_share == measurement.temp_bytes / 4000 == measurement.record()["temp_share"]
    assert measurement._replace(temp_bytes=None).temp_share is None


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


def test_free_memory_is_known_where_the_kernel_tells(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   3 kB\n")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.removeprefix("/proc/"))
    assert machine.available_bytes() == 3 * 1024
    (tmp_path / "meminfo").unlink()
    assert machine.available_bytes() is None


@pytest.fixture
def stub(monkeypatch):
    """The workload `cedar`, replaced by one that costs nothing."""
    workload = Workload(
        title="squares",
        unit="client",
        num_clients=(3, 4),
        layouts=lambda count, dtype: [small_case("loop", units=count), small_case("vmap", units=count)],
        parts=lambda count, dtype, layout: [small_case(layout, "half", count), small_case(layout, "whole", count)],
        goal_ms=0.6,
    )
    monkeypatch.setattr(cedar, "WORKLOAD", workload)
    monkeypatch.setattr(program, "measure_ceilings", lambda dtype: CEILINGS)
    return workload


def run(**options):
    out = io.StringIO()
    results = program.run(program.Options(**options), Console(file=out, width=120))
    return results, out.getvalue()


def test_all_sizes_are_measured_and_printed(stub):
    results, text = run(workload="cedar", repeats=5)
    assert [result.num_clients for result in results] == [3, 4]
    for result in results:
        (best,) = result.best
        assert best.ms == min(measurement.ms for measurement in result.layouts)
        assert {part.layout for part in result.parts} == {best.layout}
        assert f"cedar: {best.ms:.3f} ms a client (goal: 0.6), {best.layout}" in text
    assert "float32: 0 GFLOP/s in a matmul, 0.0 GB/s" in text


def test_each_thing_that_is_done_has_its_best_layout(stub, monkeypatch):
    def layouts(count, dtype):
        assert dtype == jnp.bfloat16
        works = {"mean": floor.Work(1.0, 1.0), "median": None}
        return [small_case(layout, part, work=work) for part, work in works.items() for layout in ("loop", "vmap")]

    monkeypatch.setattr(cedar, "WORKLOAD", stub._replace(layouts=layouts, parts=None, goal_ms=None))
    (result,), text = run(workload="cedar", clients=(7,), repeats=5, dtype="bfloat16")
    assert [best.part for best in result.best] == ["mean", "median"] and result.parts == []
    mean, median = result.best
    assert f"cedar, mean: {mean.ms:.3f} ms a client, {mean.layout}; {mean.ratio:.1f} times the floor" in text
    assert text.rstrip().endswith(f"cedar, median: {median.ms:.3f} ms a client, {median.layout}")


def test_a_row_that_did_not_run_says_why(stub, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "available_bytes", lambda: 0)
    path = tmp_path / "numbers.json"
    monkeypatch.setattr(cedar, "WORKLOAD", stub._replace(parts=None))
    _, text = run(workload="cedar", clients=(5,), repeats=5, json=path)
    assert "needs 0.0 GiB of 0.0" in text
    (record,) = json.loads(path.read_text())["results"]
    assert record["layouts"][0]["ms"] is None and record["layouts"][0]["skipped"]


def test_the_numbers_are_written_as_json(stub, tmp_path):
    path = tmp_path / "new" / "numbers.json"
    (result,), _ = run(workload="cedar", clients=(5,), repeats=5, json=path)
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] == machine.num_cores()
    (record,) = written["results"]
    assert (record["workload"], record["num_clients"]) == ("cedar", 5)
    (best,) = result.best
    assert record["best"] == [{"part": "whole", "layout": best.layout, "ms": best.ms}]
    assert (written["dtype"], written["ceilings"]) == ("float32", {"operations": 2e6, "bytes": 1e6})
    assert [row["layout"] for row in record["layouts"]] == ["loop", "vmap"]
    assert record["parts"][1]["seconds"] == result.parts[1].seconds
    assert [file.name for file in path.parent.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 1}, "--repeats"),
        ({"clients": (0,)}, "--clients"),
        ({"peers": True, "dtype": "bfloat16"}, "--peers"),
        ({"workload": "robust", "params": 0}, "--params"),
        ({"workload": "robust", "params": 10_000_000, "peers": True}, "--params"),
        ({"workload": "robust", "rules": ("krum", "crumb")}, "--rules"),
        ({"workload": "cedar", "rules": ("krum",)}, "--params, --rules and --weighted"),
        ({"workload": "mlp", "weighted": True}, "--params, --rules and --weighted"),
    ],
)
def test_options_out_of_range(options, message, monkeypatch):
    monkeypatch.setattr(program, "measure_ceilings", lambda dtype: CEILINGS)
    with pytest.raises(ValueError, match=f"{message} must"):
        run(**options)


@pytest.mark.standard_promotion
def test_cedar_is_the_round_that_it_claims_to_be():
    problem = cedar.problem(3, jnp.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(problem.params)) == 117_706
    by_layout = cedar.by_layout(3, jnp.float32)
    names = [case.layout for case in by_layout]
    assert names == ["loop", "vmap", f"mesh of {len(jax.devices())}, vmap"]  # on the mesh a client a device
    parts = {case.part: case for case in cedar.by_part(3, jnp.float32, "loop")}
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
