"""The environments of peers: built once from their lists, built again if that was interrupted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import peers
from bench.peers import environment


class Steps:
    """Stands in for `subprocess.run`: makes the folder of an environment, and ends as it is told."""

    def __init__(self, monkeypatch, status: int = 0, output: str = ""):
        self.commands: list[list[str]] = []
        self.status, self.output = status, output
        monkeypatch.setattr(environment.subprocess, "run", self)

    def __call__(self, command, **options):
        self.commands.append([str(part) for part in command])
        if "venv" in command:
            python = Path(command[-1]) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, self.status, "", self.output)


@pytest.fixture
def requirements(tmp_path) -> Path:
    path = tmp_path / "peer.txt"
    path.write_text("something==1.0\n", encoding="utf-8")
    return path


def test_environment_is_built_once(tmp_path, monkeypatch, requirements):
    steps, told = Steps(monkeypatch), []
    python = environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=told.append)
    assert python.exists()
    assert [command[1:3] for command in steps.commands] == [["-m", "venv"], ["-m", "pip"]]
    assert steps.commands[1][-2:] == ["-r", str(requirements)]
    assert "--system-site-packages" not in steps.commands[0]
    assert environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=told.append) == python
    assert len(steps.commands) == 2
    assert told == ["installing peer"]


def test_second_list_is_installed_without_dependencies(tmp_path, monkeypatch, requirements):
    steps = Steps(monkeypatch)
    before = environment.key(requirements)
    second = requirements.with_name("peer.nodeps.txt")
    second.write_text("other==1.0\n", encoding="utf-8")
    assert environment.key(requirements) != before
    environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)
    _, first, last = steps.commands
    assert "--no-deps" not in first and first[-1] == str(requirements)
    assert last[-3:] == ["--no-deps", "-r", str(second)]


def test_same_requirements_share_an_environment_and_others_do_not(tmp_path, monkeypatch, requirements):
    Steps(monkeypatch)
    twin, other = tmp_path / "twin.txt", tmp_path / "other.txt"
    shutil.copy(requirements, twin)
    other.write_text("something==2.0\n", encoding="utf-8")
    pythons = [
        environment.ensure(path.stem, path, cache=tmp_path / "cache", tell=lambda text: None)
        for path in (requirements, twin, other)
    ]
    assert pythons[0] == pythons[1] != pythons[2]


@pytest.mark.parametrize("stamp", [None, "", "of something else"])
def test_interrupted_build_starts_over(tmp_path, monkeypatch, requirements, stamp):
    steps = Steps(monkeypatch)
    left = tmp_path / "cache" / environment.key(requirements)
    (left / "half").mkdir(parents=True)
    if stamp is not None:
        (left / "stamp").write_text(stamp, encoding="utf-8")
    python = environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)
    assert python.exists()
    assert not (left / "half").exists()
    assert len(steps.commands) == 2


def test_failed_installation_is_reported_and_leaves_no_stamp(tmp_path, monkeypatch, requirements):
    steps = Steps(
        monkeypatch, 1, "Collecting something\nERROR: No matching distribution\nnote: the error is not ours\n"
    )
    message = r"^cannot install peer: ERROR: No matching distribution$"
    for _ in range(2):  # the second time without another try
        with pytest.raises(peers.PeerUnavailable, match=message) as caught:
            environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)
        assert caught.value.reason == str(caught.value)
    assert len(steps.commands) == 2
    assert not list((tmp_path / "cache").rglob("stamp"))


@pytest.mark.slow
def test_installation_that_really_fails(tmp_path):
    requirements = tmp_path / "peer.txt"
    requirements.write_text(f"{tmp_path}/nothing_here-1.0-py3-none-any.whl\n", encoding="utf-8")
    with pytest.raises(peers.PeerUnavailable, match="cannot install peer: .*nothing_here"):
        environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)


def test_gist_prefers_errors():
    assert environment.gist("a\n\nb\n c \n", most=2) == "b | c"
    assert environment.gist("ERROR: x\nb\nhint: error") == "ERROR: x"
    assert environment.gist("") == ""


def test_variables_of_this_environment_stay_here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setenv("XLA_FLAGS", "kept")
    assert "PYTHONPATH" not in environment.outside()
    assert environment.outside()["XLA_FLAGS"] == "kept"
