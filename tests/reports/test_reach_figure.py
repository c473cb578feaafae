"""Accuracy over lengths and loops: which panels there are, and what each shows."""

import numpy as np
from results_files import gathered, results, score

from spak_jax.reports.reach_figure import draw_reach

LENGTHS = (4, 8, 16, 32)


def looped(loops, lengths=LENGTHS):
    """Right where there are as many loops as digits."""
    scores = {str(n): score(1000 if n <= loops else 0, zero_shot=n > 8) for n in lengths}
    return results("loop", "Loop", 8, loops, lengths=scores, published_columns={})


def stacked(lengths):
    scores = {str(n): score(1000 if n <= 8 else 0, zero_shot=n > 8) for n in lengths}
    return results("gpt", "Stack", None, None, lengths=scores, published_columns={})


def panels(*contents):
    figure = draw_reach(gathered(*contents)[0])
    return [axes for axes in figure.axes if axes.images and axes.get_xlabel()]


def test_the_line_rises_with_the_loops_that_a_length_needs():
    [axes] = panels(*map(looped, (8, 16, 32)))
    cells = axes.images[0].get_array()
    np.testing.assert_array_equal(cells, 100 * np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1] * 4]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "16", "32"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8", "16", "32"]
    [line] = axes.patches
    np.testing.assert_array_equal(line.get_data().values, [-0.5, -0.5, 0.5, 1.5])


def test_a_stack_beside_it_shows_the_same_lengths():
    _, stack = panels(*map(looped, (8, 16, 32)), stacked((*LENGTHS, 64, 128)))
    assert [label.get_text() for label in stack.get_xticklabels()] == ["4", "8", "16", "32"]
    np.testing.assert_array_equal(stack.images[0].get_array(), [[100, 100, 0, 0]])


def test_what_is_no_grid_is_not_drawn():
    assert draw_reach(gathered(*map(looped, (8, 16)), stacked(LENGTHS))[0]) is None
    assert draw_reach(gathered(*(looped(n, (4, 8)) for n in (8, 16, 32)))[0]) is None
    [alone] = panels(*map(looped, (8, 16, 32)), stacked((64, 128, 256)))
    assert alone.get_title().startswith("Loop")
