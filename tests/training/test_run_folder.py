"""Run folders: how they may be called, and who may write to them."""

import os
import sys
from pathlib import Path

import pytest

from spak_jax.command_line import InputError
from spak_jax.training import run_folder


def test_names_of_run_folders(tmp_path):
    (tmp_path / "file").touch()
    assert run_folder.run_folder(str(tmp_path)) == tmp_path
    assert run_folder.run_folder("none/yet") == Path("none/yet")
    with pytest.raises(InputError, match="is empty"):
        run_folder.run_folder("")
    for name in ("file", "file/run"):
        with pytest.raises(InputError, match=f"{name} cannot be a folder"):
            run_folder.run_folder(str(tmp_path / name))
    with pytest.raises(InputError, match="File name too long"):
        run_folder.run_folder("x" * 300)


def test_without_the_system_s_locks_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (
        pytest.raises(InputError, match="writing run folders needs Linux"),
        run_folder.locked(tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_is_held_by_one_and_names_nobody_afterwards(tmp_path):
    with run_folder.locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / run_folder.LOCK).read_text()
        with (
            pytest.raises(InputError, match=r"another process \(process \d+ on "),
            run_folder.locked(tmp_path),
        ):
            pass
    assert (tmp_path / run_folder.LOCK).read_text() == ""
    with run_folder.locked(tmp_path):
        pass
