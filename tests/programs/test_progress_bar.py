"""Progress off a terminal: when it is printed, and in which words."""

import contextlib
import io

import pytest

from pallas_kernels.programs import progress_bar
from spak_jax.command_line import progress


class Clock:
    """Time as a test wants it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def lines_of(work, monkeypatch, *arguments, **more) -> list[str]:
    """What `progress` prints off a terminal while `work(bar, clock)` goes on."""
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(progress_bar, "time", clock)
    with contextlib.redirect_stdout(out), progress(*arguments, **more) as bar:
        work(bar, clock)
    return out.getvalue().splitlines()


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress_bar, "BETWEEN_LINES", 0.05)

    def work(bar, clock):
        for _ in range(4):
            clock.now += 5.0
            bar.advance(10, "loss 0.5")
        for _ in range(200):
            if bar._printed:
                break
            programs_wait(0.02)

    import time as real

    programs_wait = real.sleep
    lines = lines_of(work, monkeypatch, "working", 100, unit="steps")
    expected = "working: 40 of 100 steps, about 30 s left, loss 0.5, 2.0 a second, after 20 s"
    assert expected in lines


def test_short_work_says_nothing_and_its_last_status_is_said(monkeypatch):
    assert lines_of(lambda bar, clock: bar.advance(), monkeypatch, "working", 1) == []
    ended = lines_of(lambda bar, clock: bar.advance(1, "loss 1"), monkeypatch, "working", 1)
    assert ended == ["working: 1 of 1, loss 1, after 0 s"]


@pytest.mark.parametrize(("seconds", "warned"), [(0.5, False), (100.0, True)])
def test_long_work_says_once_what_to_do_instead(seconds, warned, monkeypatch):
    def work(bar, clock):
        for _ in range(10):
            clock.now += seconds
            bar.advance()

    lines = lines_of(work, monkeypatch, "working", 1_000, instead="take a walk")
    assert sum("take a walk" in line for line in lines) == warned
    if warned:
        assert lines[0] == "working: about 27.7 hours to go; take a walk"


def test_work_within_work_is_not_shown(monkeypatch):
    def work(bar, clock):
        with progress("inner", 1) as inner:
            inner.advance(1, "unseen")

    assert lines_of(work, monkeypatch, "outer") == []
