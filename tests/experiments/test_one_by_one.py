"""Pieces of work that are done one after another, stored, and gone on with."""

import io
import os
import signal

import pytest
from rich.console import Console

from experiments.comparison import Interrupted
from experiments.one_by_one import one_by_one

LABELS = {"a": "First", "b": "Second", "c": "Third"}


def console():
    return Console(file=io.StringIO(), width=200)


def test_what_is_stored_is_not_done_again(tmp_path):
    done = []

    def work(name):
        done.append(name)
        return {"name": name, "value": len(done)}

    first = one_by_one({"a": "First", "c": "Third"}, work, tmp_path / "pieces", console())
    every = one_by_one(LABELS, work, tmp_path / "pieces", console(), told=lambda record: str(record["value"]))
    assert done == ["a", "c", "b"]
    assert [record["name"] for record in every] == ["a", "b", "c"] and [every[0], every[2]] == first


def test_ctrl_c_stores_what_was_being_done_and_says_how_to_go_on(tmp_path):
    def work(name):
        if name == "b":
            os.kill(os.getpid(), signal.SIGINT)
        return {"name": name}

    screen = console()
    with pytest.raises(Interrupted, match="stopped after Second"):
        one_by_one(LABELS, work, tmp_path / "run/pieces", screen)
    assert sorted(path.stem for path in (tmp_path / "run/pieces").iterdir()) == ["a", "b"]
    assert f"stopped after Second. The same command goes on with {tmp_path / 'run'}." in screen.file.getvalue()
    assert len(one_by_one(LABELS, lambda name: {"name": name}, tmp_path / "run/pieces", console())) == 3


def test_ctrl_c_in_the_last_piece_is_too_late(tmp_path):
    def work(name):
        if name == "c":
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    assert len(one_by_one(LABELS, work, tmp_path, console())) == 3
