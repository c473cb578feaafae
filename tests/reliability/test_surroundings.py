"""Hostile surroundings: a sample keeps every promise, and a promise that is broken is found."""

import json
import os
import random

import pytest
from conftest import assert_refused, run_program

from reliability import attempts, programs, surroundings
from reliability.attempts import Surroundings
from reliability.faults import Broken, NotTried
from reliability.programs import Program
from spak_jax.command_line import InputError

# Of every kind one trial that was once broken, or is the hardest.
SAMPLE = [
    ("train", Surroundings("a name", name=os.fsdecode(b"-[0-9]\n{}%s \xc3\xa9"))),
    ("train", Surroundings("no output", before=("sh", "-c", 'exec "$@" >&-', "sh"), silent=True)),
    ("evaluate", Surroundings("no GPU", {"JAX_PLATFORMS": "cuda"}, refusal=("cuda",))),
    ("solve", Surroundings("64 files", before=("sh", "-c", 'ulimit -n 64; exec "$@"', "sh"))),
    ("check", Surroundings("ASCII", {"PYTHONIOENCODING": "ascii"}, "Zahlen é数", columns=80)),
    ("brief", Surroundings("nobody reads", lines=0, silent=True)),
]


@pytest.mark.slow
def test_a_sample_keeps_its_promises(tmp_path):
    tmp_path.chmod(0o711)
    prepared = attempts.prepare(tmp_path, ("train",))
    for i, (program, place) in enumerate(SAMPLE):
        outcome, _ = attempts.attempt(program, place, tmp_path / str(i), prepared)
        expected = {"no GPU": "refused, nothing lost", "nobody reads": "ended unheard"}
        assert outcome in ("did its work", expected.get(place.description))
    assert not [path for path in tmp_path.iterdir() if path.name.isdecimal()]


MAKES = "import pathlib; pathlib.Path('new').mkdir(); pathlib.Path('new/here').write_text('made')\n"
REFUSES = "import sys; print('error: no room: here', file=sys.stderr); sys.exit(2)\n"


def read(files, said):
    return [files.new.read_text(), None]


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Tries a program that is given as text."""
    given = programs.Files(tmp_path / "prepared", "files")
    given.trained.mkdir(parents=True)
    (given.trained / "kept").write_text("kept")
    given.config.write_text("name = 1")
    program = Program(lambda files: ["odd", files.new], read)
    monkeypatch.setitem(programs.PROGRAMS, "odd", program)

    def attempt(text, made="made", **place):
        def arrange(files):
            (files.folder / "odd.py").write_text(text)

        where = Surroundings("odd", arrange=arrange, **place)
        prepared = attempts.Prepared(given.root, {"odd": [made, None]})
        return attempts.attempt("odd", where, tmp_path / "trial", prepared)

    return attempt


def test_what_a_program_makes_is_read_back(tried):
    assert tried(MAKES) == ("did its work", ["made", None])
    assert tried(MAKES, columns=80) == ("did its work", ["made", None])
    unheard = MAKES + REFUSES.replace("2", "1")
    assert tried(unheard, lines=1, silent=True) == ("did its work, unheard", ["made", None])
    assert tried(REFUSES, refusal=("room", "space")) == ("refused, nothing lost", None)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("", {}, "no results: FileNotFoundError"),
        (MAKES.replace("'made'", "'other'"), {}, "other results"),
        (MAKES + "print('careful', file=__import__('sys').stderr)", {}, "did its work, and says"),
        (MAKES + "pathlib.Path('more').touch()", {}, "'here/more' was not asked for"),
        (MAKES + "pathlib.Path('here/kept').unlink()", {}, "'here/here/kept' is changed or lost"),
        (MAKES + "import tempfile; tempfile.mkdtemp()", {}, "temporary files are left"),
        ("1 / 0", {"refusal": ()}, "ZeroDivisionError"),
        (REFUSES, {}, "refused: error: no room"),
        (REFUSES, {"refusal": ("denied",)}, "the cause is not named"),
        (REFUSES.replace("no", "no\\n"), {"refusal": ()}, "not one line"),
        (REFUSES.replace("no room", "damaged"), {"refusal": ()}, "blamed on good files"),
        (REFUSES.replace("2", "3"), {"refusal": ()}, "status 3"),
        (MAKES + "print('│ numb… │')", {"columns": 80}, "cut at 80 columns"),
        (MAKES + "print(78 * ' ' + '数│')", {"columns": 80}, "wider than 80 columns"),
        (MAKES + REFUSES, {"refusal": ()}, "refused, and leaves 'here/new/here'"),
        (REFUSES, {"lines": 0, "silent": True}, "refused: "),
        (REFUSES.replace("2", "1"), {"lines": 0, "silent": True}, "no results: FileNotFound"),
        ("import os; os.kill(os.getpid(), 9)", {"refusal": ()}, "status -9"),
        ("import time; time.sleep(99)", {}, "did not end"),
        ("import time; time.sleep(99)", {"columns": 80}, "did not end"),
        ("import time; time.sleep(99)", {"lines": 1}, "did not end"),
    ],
)
def test_a_broken_promise_is_found(tried, monkeypatch, text, place, said):
    if "sleep" in text:
        monkeypatch.setattr(attempts, "PATIENCE", 0.5)
    with pytest.raises(Broken, match=said):
        tried(text, **place)


def test_every_kind_has_trials_of_every_program_it_names():
    for name, kind in surroundings.CAMPAIGN.items():
        drawn = [list(kind.trials(random.Random(0))) for _ in range(2)]
        plans = [[(place.description, tuple(some)) for place, some in trials] for trials in drawn]
        assert plans[0] == plans[1], f"{name} is not drawn anew the same"
        named = {program for _, some in plans[0] for program in some}
        assert named <= programs.PROGRAMS.keys() and len(plans[0]) > 3
        for place, _ in drawn[0]:
            parts = [os.fsencode(part) for part in place.name.split("/")]
            assert all(0 < len(part) <= 255 and b"\0" not in part for part in parts)


def test_a_campaign_tells_all_and_adds_to_its_file(tmp_path, monkeypatch, capsys):
    def trial(program, place, folder, prepared):
        if place.description == "missing":
            raise NotTried("no such thing")
        if place.description == "bad":
            raise Broken("it went wrong")
        return "did its work", None

    monkeypatch.setattr(surroundings, "prepare", lambda folder: None)
    monkeypatch.setattr(surroundings, "attempt", trial)
    path = tmp_path / "found.json"
    for name, places in (("one", ("good", "missing")), ("two", ("good", "bad"))):
        trials = lambda moments, places=places: iter(  # noqa: E731
            [(Surroundings(description), ("train", "solve")) for description in places]
        )
        monkeypatch.setitem(surroundings.CAMPAIGN, name, surroundings.Kind(trials, name))
        monkeypatch.setattr("sys.argv", ["surroundings", name, "--json", str(path)])
        if name == "two":
            with pytest.raises(surroundings.Failure, match="a promise was broken: two"):
                surroundings.main()
        else:
            surroundings.main()
    found = json.loads(path.read_text())
    assert found["one"]["tried"] == 2 and found["one"]["not_tried"] == {"no such thing": 2}
    assert found["two"]["broken"] == [f"bad, {each}: it went wrong" for each in ("train", "solve")]
    assert "| two | 4 | did its work: 2; **broken**: 2 |" in capsys.readouterr().out
    path.write_text('{"system": {}}')
    with pytest.raises(InputError, match="holds no results of this program"):
        surroundings.main()


def test_an_unknown_kind_is_refused():
    assert_refused(run_program("reliability.surroundings", "weather"), "weather: must be of paths,")
