"""Several runs in one table."""

import json

import numpy as np
import pytest

from experiments.personalisation import overview


def record(curve, own=((0.5, 0.5),), clients=(((0.0, 0.5), (0.0, 0.7)),)):
    return {"curve": curve, "own_curve": own, "clients": clients}


def store(folder, **records):
    (folder / "contenders").mkdir(parents=True)
    for key, content in records.items():
        (folder / "contenders" / f"{key}.json").write_text(json.dumps(content))
    return folder


def test_a_table(tmp_path):
    one = store(
        tmp_path / "one",
        scratch=record([[0.0, 0.1], [0.0, 0.3]]),
        fedavg=record([[0.0, 0.8], [0.0, 0.6]]),
        ditto=record([[0.0, 0.65], [0.0, 0.65]]),
    )
    two = store(tmp_path / "two", fedavg=record([[0.0, -0.5]]), maml=record([[0.0, 10.25]]))
    runs = {folder.name: overview.load_records(folder) for folder in (one, two)}
    assert overview.table(overview.VIEWS[1], runs).splitlines() == [
        "| | one | two |",
        "|---|---:|---:|",
        "| MAML | – | **10.250 ±.000** |",
        "| FedAvg | **.700 ±.100** | -.500 ±.000 |",
        "| Ditto | **.650 ±.000** | – |",
        "| no training | .200 ±.100 | – |",
    ]


def test_a_run_that_diverged_is_last(tmp_path):
    one = store(tmp_path / "one", fedavg=record([[0.0, None], [0.0, 0.9]]), maml=record([[0.0, -5.0], [0.0, -5.0]]))
    assert overview.table(overview.VIEWS[1], {"one": overview.load_records(one)}).splitlines()[2:] == [
        "| MAML | **-5.000 ±.000** |",
        "| FedAvg | diverged |",
    ]


def test_the_worst_tenth_is_of_clients_after_the_last_step():
    clients = np.zeros((2, 20, 2))
    clients[:, :, 1] = np.linspace(0.05, 1.0, 20)
    clients[1, :, 1] += 0.5
    found = overview.VIEWS[2].read(record([[0.0]], clients=clients.tolist()))
    np.testing.assert_allclose(found, [0.075, 0.575], atol=1e-6)


def test_the_command(tmp_path, capsys):
    store(tmp_path / "one", fedavg=record([[0.1, 0.2]]))
    assert overview.main([str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| FedAvg |") == len(overview.VIEWS) and all(v.title in printed for v in overview.VIEWS)
    assert overview.main([str(tmp_path / "none")]) == 2
    assert "run directories" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "told"), [(0.5, ".500"), (-0.25, "-.250"), (10.5, "10.500"), (-1.0, "-1.000")])
def test_numbers_are_short(value, told):
    assert overview._short(value) == told
