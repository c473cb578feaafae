"""Fuzzing: the readers stand it for a while, and a reader that does not is found."""

from pathlib import Path

import pytest

from reliability import fuzz
from spak_jax.command_line import InputError


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_reader_takes_or_refuses(name):
    if name == "pytorch":
        pytest.importorskip("torch")
    found = fuzz.fuzz(name, 40, seed=1)
    assert found.broken is None and found.tried >= 40
    assert found.refused > 0


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text, folder: int("x"), "ValueError"),
        (lambda text, folder: Path("/etc/passwd").read_bytes(), "it did open"),
        (lambda text, folder: refusing(folder.parent / "elsewhere"), "it did open"),
    ],
)
def test_what_a_reader_must_not_do_is_found_with_the_smallest_input(monkeypatch, harm, said):
    def reader(st, folder):
        def read(text):
            if len(text) > 2:
                harm(text, folder)

        return fuzz.Reader(st.text("ab"), read)

    monkeypatch.setitem(fuzz.READERS, "odd", reader)
    found = fuzz.fuzz("odd", 200, seed=1)
    assert said in found.broken and "'aaa'" in found.broken


def refusing(path):
    """Looks for a file where no reader may look, and refuses its input as there is none."""
    try:
        path.read_bytes()
    except OSError as error:
        raise InputError(str(error)) from None


def test_a_refusal_is_one_line(monkeypatch):
    def reader(st, folder):
        def read(text):
            raise InputError(f"wrong: {text}")

        return fuzz.Reader(st.text("a\n"), read)

    monkeypatch.setitem(fuzz.READERS, "odd", reader)
    assert "not one line" in fuzz.fuzz("odd", 200, seed=1).broken
