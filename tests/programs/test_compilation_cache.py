"""What has been compiled is kept for the next process, where it may be."""

from pathlib import Path
from unittest import mock

import pytest
from conftest import run_lines

from pallas_kernels.programs import compilation_cache

ADDS = """
import jax, jax.numpy as jnp, sys
from pallas_kernels.programs import run_program
def main():
    print(float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((64, 64)))))
    print(jax.config.jax_compilation_cache_dir or None)
run_program(main)
"""


def compiled_in(caches: Path, **environment: str) -> list[str]:
    """What `ADDS` prints, with nothing said about caches but the user's folder."""
    own = {"XDG_CACHE_HOME": str(caches), "JAX_COMPILATION_CACHE_DIR": ""} | environment
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    result = run_lines(ADDS, "", **own)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.decode().splitlines()


def test_programs_keep_what_they_compile_in_the_users_folder(tmp_path):
    pytest.importorskip("filelock")
    first = compiled_in(tmp_path)
    folder = Path(first[1])
    assert folder.parent == tmp_path / "spak-jax" and folder.stat().st_mode & 0o077 == 0
    made = {path.name for path in folder.glob("*-cache")}
    assert made
    # A killed process leaves half a program, of which no time is written yet.
    victim = sorted(folder.glob("*-cache"))[0]
    victim.write_bytes(victim.read_bytes()[:9])
    victim.with_name(victim.name.replace("-cache", "-atime")).unlink()
    assert compiled_in(tmp_path) == first
    assert {path.name for path in folder.glob("*-cache")} == made
    assert victim.stat().st_size > 9


def test_programs_work_without_a_folder_to_keep_in(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert compiled_in(file)[1] == "None"
    assert compiled_in(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1] == "None"
    elsewhere = tmp_path / "elsewhere"
    assert compiled_in(tmp_path, JAX_COMPILATION_CACHE_DIR=str(elsewhere))[1] == str(elsewhere)
    assert not (tmp_path / "spak-jax").exists() and file.read_text() == ""


def test_a_library_keeps_nothing(tmp_path):
    script = "import jax, spak_jax.train; print(jax.config.jax_compilation_cache_dir)"
    own = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert run_lines(script, "", **own).stdout.decode().split() in (["None"], [])
    assert not list(tmp_path.iterdir())


def test_kinds_of_processors_have_folders_of_their_own(monkeypatch):
    here = compilation_cache.folder()
    assert here == compilation_cache.folder()
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another")
    assert compilation_cache.folder() != here
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError))
    assert compilation_cache.folder() is None
