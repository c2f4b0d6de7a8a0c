import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import files


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("mode, old, new", [("w", "old", "new"), ("wb", b"old", b"new")])
def test_atomic_open_replaces_whole_file(tmp_path, mode, old, new):
    path = tmp_path / "deep" / "a.bin"
    for content in (old, new):
        with files.atomic_open(path, mode) as file:
            file.write(content)
    assert path.read_bytes() == b"new"
    assert names_in(path.parent) == ["a.bin"]


def test_failure_while_writing_keeps_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_open(path, "w") as file:
        file.write("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_failure_while_replacing_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"round": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"round": 2})
    assert json.loads(path.read_text()) == {"round": 1}
    assert names_in(tmp_path) == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    files.write_npz(path, {"x": np.arange(3)})
    with pytest.raises(TypeError, match=r"arrays\['x'\]"):
        files.write_npz(path, {"x": np.array([None, 1], dtype=object)})
    with np.load(path) as file:
        assert file["x"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "b.json", {"x": object()})
    assert names_in(tmp_path) == ["a.npz"]


def test_atomic_open_refuses_other_modes(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'wb' or 'w', got 'a'"), files.atomic_open(tmp_path / "a", "a"):
        pass


def test_json_takes_arrays_tuples_paths_and_non_finite_numbers(tmp_path):
    value = {
        "a": jnp.arange(2),
        "b": np.float32(0.5),
        "c": (1, [np.int64(2)]),
        "d": float("inf"),
        "e": tmp_path,
        3: np.array([[1.0, np.nan]]),
        "f": np.bool_(True),
        "g": files.RunDir(*"abcdef"),
    }
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == {
        "a": [0, 1],
        "b": 0.5,
        "c": [1, [2]],
        "d": None,
        "e": str(tmp_path),
        "3": [[1.0, None]],
        "f": True,
        "g": dict(zip(files.RunDir._fields, "abcdef", strict=True)),
    }


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        files.read_json(tmp_path / "config.json")


def test_log_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_jsonl(path) == []
    for number in range(3):
        files.append_jsonl(path, {"round": number, "text": "line\nbreak ü"}, sync=number == 2)
    assert files.read_jsonl(path) == [{"round": number, "text": "line\nbreak ü"} for number in range(3)]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("kept", range(1, 14))
def test_torn_last_line_is_skipped_and_cut_off_by_the_next_append(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    files.append_jsonl(path, {"round": 0})
    line = b'{"round": 12}\n'
    path.write_bytes(path.read_bytes() + line[:kept])
    whole = kept == 13  # all but the newline: the record is complete
    expected = [{"round": 0}] + [{"round": 12}] * whole
    assert files.read_jsonl(path) == expected
    files.append_jsonl(path, {"round": 2})
    assert files.read_jsonl(path) == [*expected, {"round": 2}]


def test_torn_line_longer_than_a_block_and_torn_first_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n{"x": "' + b"a" * 10_000)
    assert files.repair_jsonl(path) == 10_007
    assert path.read_bytes() == b'{"round": 0}\n'
    path.write_bytes(b'{"round"')
    assert files.repair_jsonl(path) == 8
    assert files.read_jsonl(path) == []


def test_torn_multibyte_character(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n' + '{"x": "ü'.encode()[:-1])
    assert files.read_jsonl(path) == [{"round": 0}]
    files.repair_jsonl(path)
    assert path.read_bytes() == b'{"round": 0}\n'


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 must be a JSON object"):
        files.read_jsonl(path)


def test_record_that_is_no_mapping_leaves_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(TypeError, match="record must be a mapping"):
        files.append_jsonl(path, [1])
    with pytest.raises(TypeError, match="got object"):
        files.append_jsonl(path, {"x": object()})
    assert not path.exists()


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in range(5):
        files.append_jsonl(path, {"round": number})
    path.write_bytes(path.read_bytes() + b'{"round"')
    assert files.rewind_jsonl(path, lambda record: record["round"] <= 2) == 2
    assert [record["round"] for record in files.read_jsonl(path)] == [0, 1, 2]


def test_run_folders_are_numbered(tmp_path):
    assert files.number_run_dir(tmp_path / "runs", "digits").name == "digits-001"
    assert files.number_run_dir(tmp_path / "runs", "digits").name == "digits-002"
    (tmp_path / "runs" / "digits-010").mkdir()
    (tmp_path / "runs" / "digits-010-copy").mkdir()
    assert files.number_run_dir(tmp_path / "runs", "digits").name == "digits-011"
    for label in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="label must be a plain folder name"):
            files.number_run_dir(tmp_path, label)


def test_start_refuses_to_touch_another_run(tmp_path):
    places = files.start_run(tmp_path / "run", {"seed": 0})
    assert places.checkpoints.is_dir() and places.plots.is_dir()
    with pytest.raises(files.RunDirError, match="already holds a run"):
        files.start_run(tmp_path / "run", {"seed": 1})
    assert files.read_json(places.config) == {"seed": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(files.RunDirError, match="must be a folder"):
        files.start_run(tmp_path / "file", {})


def test_resume_checks_the_configuration(tmp_path):
    config = {"seed": 0, "rounds": 10, "alpha": 0.5, "widths": (64, 64)}
    places = files.start_run(tmp_path / "run", config)
    files.append_jsonl(places.metrics, {"round": 0})
    places.metrics.write_bytes(places.metrics.read_bytes() + b'{"rou')
    assert files.resume_run(places.root, config) == places
    assert places.metrics.read_bytes() == b'{"round": 0}\n'
    assert files.resume_run(places.root, config | {"rounds": 20}, may_differ=["rounds"]) == places
    with pytest.raises(files.RunDirError, match=r"alpha: 0\.5 then, 1\.0 now; seed: 0 then, 1 now"):
        files.resume_run(places.root, config | {"seed": 1, "alpha": 1.0})
    with pytest.raises(files.RunDirError, match=r"holds no run to resume: config\.json is absent"):
        files.resume_run(tmp_path / "nothing", config)
    assert not (tmp_path / "nothing").exists()
