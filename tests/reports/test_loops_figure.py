"""Accuracy over loops at inference: what is drawn, and what is left out."""

import pytest
from drawn_figures import caption, legend
from results_files import MANY_LENGTHS, gathered, results, score

from spak_jax.reports import loops_figure


def test_test_time_loops_draws_what_loops_change_and_marks_the_trained_number():
    def at(loops, correct):
        columns = {"1-4": score(1000), "5-6": score(correct), "8": score(0, zero_shot=True)}
        return results(loops=loops, published_columns=columns)

    figure = loops_figure.draw_test_time_loops(gathered(at(24, 900), at(8, 300), at(12, 800))[0])
    [axes] = figure.axes
    assert legend(figure) == ["5-7 digits"]
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(curve.get_xdata()) for curve in curves] == [[8, 12, 24]]
    assert list(curves[0].get_ydata()) == pytest.approx([30, 80, 90])
    assert [12, 12] in [list(line.get_xdata()) for line in axes.lines]
    assert "1-4 digits (100%), 8-9 digits (0%)" in caption(figure)


def test_loops_without_columns_are_drawn_by_length():
    def own(loops, correct):
        lengths = {"3": score(correct), "5": score(500)}
        return results(loops=loops, lengths=lengths, published_columns={}, problems="mine.txt")

    figure = loops_figure.draw_test_time_loops(gathered(own(12, 100), own(24, 300))[0])
    assert legend(figure) == ["3 digits"]


def scored_by_loops(name, lengths):
    """A system at 4 and 8 loops, without published columns; longer than 9 digits loops help."""
    return [
        results(
            name,
            name,
            4,
            loops,
            lengths={str(n): score(1000 if n < 10 else 50 * loops) for n in lengths},
            published_columns={},
        )
        for loops in (4, 8)
    ]


def test_of_many_lengths_eight_are_drawn_over_loops_and_the_caption_says_so():
    evaluated, _ = gathered(*scored_by_loops("Many", MANY_LENGTHS))
    figure = loops_figure.draw_test_time_loops(evaluated)
    # From 10 to 10,000 in seven steps of a factor of 2.68, or what lies nearest.
    expected = [10, 27, 72, 200, 500, 1000, 10000]
    assert legend(figure) == [f"{n} digits" for n in expected]
    assert "less than a point: 1-9 digits (100%). At most 8 lengths a panel" in caption(figure)


def test_eight_lengths_are_all_drawn_over_loops():
    evaluated, _ = gathered(
        *scored_by_loops("Eight", range(9, 18)), *scored_by_loops("One", (1, 200))
    )
    figure = loops_figure.draw_test_time_loops(evaluated)
    assert legend(figure) == [f"{n} digits" for n in (*range(10, 18), 200)]
    assert "Eight: 9 digits (100%); One: 1 digit (100%)." in caption(figure)
    assert "At most" not in caption(figure)


def test_no_loops_figure_without_two_numbers_of_loops_of_one_system():
    evaluated, _ = gathered(results(), results("loop30", "LoopLM-30", 30, 30))
    assert loops_figure.draw_test_time_loops(evaluated) is None
