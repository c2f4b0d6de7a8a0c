"""The rules of the benchmark are programs, on updates that are what they claim to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.workloads import robust

DTYPE = jnp.dtype(jnp.float32)


def test_updates_are_a_common_direction_and_noise_of_different_size():
    updates, direction = robust.inputs(20, 4000, DTYPE)
    x, common = np.asarray(updates["w"], np.float64), np.asarray(direction["w"], np.float64)
    assert np.linalg.norm(common) == pytest.approx(robust.DIRECTION_NORM, rel=0.1)
    noise = np.sort(np.linalg.norm(x - common, axis=1)) / robust.NOISE_NORM
    np.testing.assert_allclose(noise, np.linspace(0.5, 1.5, 20), rtol=0.05)
    assert robust.SMALL_RADIUS < np.linalg.norm(x, axis=1).min()
    assert np.linalg.norm(x, axis=1).max() < robust.LARGE_RADIUS
    assert robust.inputs(20, 4000, DTYPE).updates is updates


@pytest.mark.slow
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", robust.RULES)
def test_every_rule_traces_in_every_layout(name, is_weighted):
    duel = robust.duel(name, 24, 32, DTYPE, is_weighted)
    count = 10 if name in ("mda", "smea") else 24
    assert (duel.name, duel.num_clients, duel.num_params) == (name, count, 32)
    assert [case.num_devices for case in duel.cases] == ([1] if count == 10 else [1, len(jax.devices())])
    for case in duel.cases:
        update, _ = jax.eval_shape(case.fun, *case.args)
        assert update["w"].shape == (32,) and update["w"].dtype == DTYPE
        assert case.args[0]["w"].shape == (count, 32) and (case.args[2] is not None) is is_weighted
        assert case.units == 1 and case.work.operations >= 2 * count * 32 and case.work.bytes == 4 * 32 * (count + 1)


def test_the_mean_is_the_mean():
    for case in robust.duel("mean", 24, 32, DTYPE, False).cases:
        x = np.asarray(case.args[0]["w"], np.float64)
        found = robust.answer(jax.jit(case.fun)(*case.args))
        np.testing.assert_allclose(found["update"], x.mean(0), rtol=0, atol=1e-5)


def test_a_peer_gets_the_same_updates_and_arguments():
    duel = robust.duel("nnm", 24, 32, DTYPE, False)
    assert list(duel.tasks) == ["byzfl numpy", "byzfl torch"]
    for library in ("numpy", "torch"):
        peer, make_task = duel.tasks[f"byzfl {library}"]
        task = make_task()
        assert (peer, task.library) == ("byzfl", library)
        assert task.steps == (("NNM", {"f": 2}), ("Average", {}))
        np.testing.assert_array_equal(task.updates, duel.cases[0].args[0]["w"])
    assert robust.peer_task("mda", "numpy", 10, 8).steps == (("MDA", {"f": 2}),)
    assert robust.peer_task("clip", "numpy", 24, 8).steps == (("Clipping", {"c": robust.CLIP}), ("Average", {}))
    assert robust.duel("phocas", 24, 32, DTYPE, False).tasks == {}


def test_rules_and_sizes_can_be_chosen():
    workload = robust.WORKLOAD.configure(num_params=64, names=("mean",), is_weighted=True)
    assert workload.title == "robust: aggregation rules on [C, 64] updates, weighted"
    (duel,) = workload.duels(24, DTYPE)
    assert (duel.name, duel.num_params) == ("mean", 64)
    assert [case.part for case in workload.layouts(24, DTYPE)] == ["mean", "mean"]
    with pytest.raises(ValueError, match=r"--rules must be among mean, .*, got crumb\."):
        robust.workload(names=("mean", "crumb"))
