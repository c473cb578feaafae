"""Accuracy over length: lines, markers, the axis of lengths, a panel for each scheme."""

import matplotlib
import numpy as np
import pytest
from drawn_figures import caption, legend
from results_files import MANY_LENGTHS, at_lengths, gathered, results, scheme, score

from spak_jax.reports import accuracy, length_figures, style


def inches(axes, line):
    """Where a line's points are sideways, from the figure's left."""
    return axes.transData.transform(line.get_xydata())[:, 0] / axes.figure.dpi


def markers(axes):
    """The marked points, by colour."""
    found = {}
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            found.setdefault(line.get_color(), []).append(line)
    return found


def assert_tick_labels_have_room(figure, needed):
    """Each length axis has these labels at least, none on the next, on another panel's or cut."""
    figure.canvas.draw()
    rows = {}
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        shown = [label for place, label in ticks if low <= place <= high]
        assert needed <= {label.get_text() for label in shown}
        row = rows.setdefault(axes.get_position().y0, [])
        row.extend(label.get_window_extent() for label in shown)
    for boxes in rows.values():
        boxes = sorted(boxes, key=lambda box: box.x0)
        assert boxes[0].x0 > 0 and boxes[-1].x1 < figure.bbox.x1
        assert all(one.x1 + 2 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


def test_each_system_and_number_of_loops_is_a_line_of_its_own():
    evaluated, repeats = gathered(
        results(), results(loops=24), results("gpt12", "GPT-12L (Static)", None, None)
    )
    figure = length_figures.draw_generalization(evaluated)
    assert legend(figure) == [
        "LoopLM-12 (Dynamic)",
        "LoopLM-12 (Dynamic) at 24 loops",
        "GPT-12L (Static)",
    ]
    assert not repeats
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 12]
    assert len(curves) == 3
    expected = [100 - 8 * n for n in range(1, 13)]
    assert list(curves[0].get_ydata()) == pytest.approx(expected)


def test_zero_shot_lengths_have_open_markers_and_begin_at_the_marked_border():
    axes = length_figures.draw_generalization(gathered(results())[0]).axes[0]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    is_open = [mark.get_markerfacecolor() == "white" for mark in marks]
    assert is_open == [n > 6 for n in range(1, 13)]
    assert 6.5 in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]


def test_length_axis_is_logarithmic_only_for_lengths_over_40():
    long = results(lengths={str(n): score(500, zero_shot=n > 6) for n in (1, 40, 1000)})
    short = results(lengths={str(n): score(500, zero_shot=n > 6) for n in (1, 40)})
    scales = [
        length_figures.draw_generalization(gathered(r)[0]).axes[0].get_xscale()
        for r in (long, short)
    ]
    assert scales == ["log", "linear"]


@pytest.mark.parametrize(
    ("longest", "needed"),
    [
        (16, {"12"}),
        (40, {"40"}),
        (1_000, {"1", "10", "100", "1,000"}),
        (10_000, {"1", "10", "100", "1,000", "10,000"}),
        (100_000, {"1", "100", "10,000"}),
    ],
)
def test_length_axis_has_labels_that_can_be_read(longest, needed):
    lengths = at_lengths([*range(1, 13), longest])
    several = [scheme(p, lengths=lengths) for p in ("none", "rope", "learned")]
    evaluated, _ = gathered(*several)
    with matplotlib.rc_context(style.STYLE):
        assert_tick_labels_have_room(length_figures.draw_generalization(evaluated), needed)
        assert_tick_labels_have_room(length_figures.draw_schemes(evaluated), needed)
        assert_tick_labels_have_room(length_figures.draw_schemes(evaluated[:2]), needed)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("lengths", [MANY_LENGTHS, range(1, 102)])
def test_lines_pass_through_all_lengths_but_markers_keep_apart(lengths, count):
    several = [results(f"{i}", f"{i}", lengths=at_lengths(lengths)) for i in range(count)]
    figure = length_figures.draw_generalization(gathered(*several)[0])
    [axes] = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) == len(lengths)]
    assert len(curves) == count
    assert len(axes.containers) == sum(map(len, markers(axes).values()))
    for curve in curves:
        marked = [inches(axes, mark)[0] for mark in markers(axes)[curve.get_color()]]
        assert np.diff(marked).min() >= accuracy.MARKER_GAP - 1e-6
        assert 15 <= len(marked) <= 40
        ends = inches(axes, curve)[[0, -1]]
        assert [marked[0], marked[-1]] == pytest.approx(list(ends))


def test_few_lengths_all_have_markers_and_bars():
    evaluated, _ = gathered(results(lengths=at_lengths(range(1, 41))))
    [axes] = length_figures.draw_generalization(evaluated).axes
    assert [len(marks) for marks in markers(axes).values()] == [40]
    assert len(axes.containers) == 40


def test_several_seeds_are_one_line_and_the_caption_names_them():
    [line], _ = gathered(*(results(seed=s) for s in (0, 2)))
    figure = length_figures.draw_generalization([line])
    assert legend(figure) == ["LoopLM-12 (Dynamic), 2 seeds"]
    expected = "NVIDIA H100 80GB HBM3, 2026-11-22, training seeds 0, 2, 1,000 problems a length"
    assert expected in caption(figure)
    assert "Student intervals of the mean over training seeds" in caption(figure)


def test_schemes_have_a_panel_each_and_a_model_looks_the_same_in_all():
    evaluated, _ = gathered(
        scheme("coupled-bias", depth=2, looped=False),
        *(scheme("coupled-bias", seed=s, lengths=at_lengths(range(1, 13), 700)) for s in (0, 1)),
        scheme("coupled-bias", window=True, lengths=at_lengths(range(1, 13), 900)),
        scheme("coupled-bias", window=True, loops=8),
        # Files from before there was a choice of schemes.
        results("old", "Old", 4, 4, lengths=at_lengths(range(1, 13), 100)),
    )
    figure = length_figures.draw_schemes(evaluated)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["coupled-bias", "coupled-bias, window", "rope"]
    assert legend(figure) == [
        "GPT, 2 layers",
        "LoopLM, 4 loops, 1 to 2 seeds",
        "LoopLM, 4 loops, at 8",
    ]
    colour = figure.legends[0].get_lines()[1].get_color()
    heights = []
    for axes in figure.axes:
        [curve] = [
            line
            for line in axes.lines
            if len(line.get_xdata()) == 12 and line.get_color() == colour
        ]
        heights.append(curve.get_ydata()[0])
        assert {m.get_marker() for m in markers(axes)[colour]} == {style.MARKERS[1]}
    assert heights == pytest.approx([70, 90, 10])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert "Lengths: every input exactly this long." in caption(figure)


def test_schemes_mark_each_panels_own_trained_lengths():
    short = {str(n): score(500, zero_shot=n > 3) for n in range(1, 13)}
    evaluated, _ = gathered(scheme("rope", lengths=short), scheme("none"))
    for axes, border in zip(length_figures.draw_schemes(evaluated).axes, (3.5, 6.5), strict=True):
        assert border in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        marks = [mark for found in markers(axes).values() for mark in found]
        is_open = [mark.get_markerfacecolor() == "white" for mark in marks]
        assert is_open == [mark.get_xdata()[0] > border for mark in marks]
        assert 0 < sum(is_open) < len(marks)


def test_many_schemes_stand_three_in_a_row_and_share_the_accuracy_axis():
    evaluated, _ = gathered(*(scheme(f"scheme {i}") for i in range(8)))
    axes = length_figures.draw_schemes(evaluated).axes
    labelled = [bool(a.get_ylabel()) for a in axes]
    assert labelled == [True, False, False] * 2 + [True, False]
    assert [a.yaxis.get_tick_params()["labelleft"] for a in axes] == labelled
