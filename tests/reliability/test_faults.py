"""Faults: the short campaign keeps every promise, and a promise that is broken is reported."""

import json

import pytest
from conftest import assert_refused, run_program

from reliability import faults
from spak_jax.command_line import InputError


@pytest.mark.parametrize(
    ("name", "times", "became"),
    [
        ("killed", 1, "killed"),
        ("damage", 1, "refused, the checkpoint and the good one before it named"),
        ("read-only", 2, "refused, nothing changed"),
        ("pickle", 15, "refused, nothing run"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("killed", 2, "killed"),
                ("signals", 3, "ended with a checkpoint of the last step"),
                ("disk-full", 2, "one message, and the training went on to the same bits"),
                ("vanished", 1, "one message, checkpoints good"),
                ("second", 1, "the second refused"),
                ("lost-process", 1, "the other ended"),
            )
        ),
    ],
)
def test_a_promise_is_kept(name, times, became, tmp_path):
    found = faults.attempt(name, tmp_path, times)
    if found["not_tried"]:
        pytest.skip(found["not_tried"])
    assert found["broken"] is None and found["tried"] >= times
    assert any(words.startswith(became) for words in found["outcomes"]), found["outcomes"]


def test_a_broken_promise_is_reported_with_what_was_tried(tmp_path, monkeypatch):
    def twice(folder, times, moments):
        yield "went well"
        raise faults.Broken("the second went wrong")

    def missing(folder, times, moments):
        raise faults.NotTried("there is no such thing")
        yield

    monkeypatch.setitem(faults.CAMPAIGN, "odd", faults.Campaign(twice, "odd", 2))
    monkeypatch.setitem(faults.CAMPAIGN, "none", faults.Campaign(missing, "none", 2))
    found = {name: faults.attempt(name, tmp_path) for name in ("odd", "none")}
    assert (found["odd"]["tried"], found["odd"]["broken"]) == (2, "the second went wrong")
    assert (found["none"]["tried"], found["none"]["not_tried"]) == (0, "there is no such thing")
    table = faults.table({name: each | {"date": "today"} for name, each in found.items()})
    assert "| odd | 2 | went well: 1; **broken**: the second went wrong | today |" in table
    assert "| none | 0 | not tried: there is no such thing | today |" in table


def test_a_campaign_adds_to_its_file_and_to_no_other(tmp_path, monkeypatch):
    path = tmp_path / "faults.json"
    for name in ("one", "two"):
        fault = lambda folder, times, moments: iter(["went well"])  # noqa: E731
        monkeypatch.setitem(faults.CAMPAIGN, name, faults.Campaign(fault, name, 1))
        monkeypatch.setattr("sys.argv", ["faults", name, "--json", str(path)])
        faults.main()
    found = json.loads(path.read_text())
    assert {name: each["tried"] for name, each in found.items()} == {"one": 1, "two": 1}
    for other in ("{", "[]", '{"one": 1}', '{"system": {}}'):
        path.write_text(other)
        with pytest.raises(InputError, match="holds no results of this program"):
            faults.main()
        assert path.read_text() == other


def test_an_unknown_fault_is_refused():
    assert_refused(run_program("reliability.faults", "flood"), "flood: must be of killed,")
