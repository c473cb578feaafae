"""Files of specifications: found by their names, or what there is is listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from spak_jax.command_line import InputError
from spak_jax.config_files import named_file


@pytest.mark.parametrize("given", ["é数/Zahlen é数🙂.toml", "é数=1.toml"])
def test_a_file_is_found_by_its_name_in_an_ascii_locale(given, tmp_path):
    (tmp_path / "é数").mkdir()
    (tmp_path / given).write_text("odd = 1")
    environment = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    # The file is read, and what it lacks is said.
    result = subprocess.run(
        [sys.executable, "-m", "spak_jax.train", given],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
    )
    assert result.returncode == 2 and b"is missing" in result.stderr, result.stderr


def test_a_file_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("loop12", "gpt12"):
        (folder / f"{name}.toml").write_text("")
    for word in ("loop12", "loop12.toml", Path("configs/loop12.toml")):
        assert named_file(word, Path("configs")) == Path("configs/loop12.toml")
    (tmp_path / "gpt12").mkdir()
    assert named_file("gpt12", Path("configs")) == Path("configs/gpt12.toml")
    (tmp_path / "loop12").write_text("")
    assert named_file("loop12", Path("configs")) == Path("loop12")


@pytest.mark.parametrize("word", ["loop13", "x" * 300, "", "configs", "no/loop12.toml", "a\0b"])
def test_an_unknown_name_lists_what_there_is(word):
    with pytest.raises(InputError, match="loop128e") as refused:
        named_file(word, ROOT / "configs")
    assert len(str(refused.value)) < 600
    if "loop1" in word:
        assert "did you mean loop" in str(refused.value)
