"""The figures program: which files it writes, what is drawn in them, and what it refuses."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, assert_refused, run_program
from results_files import CURVE, gathered, results, score, written

from spak_jax import figures as program
from spak_jax.command_line import InputError
from spak_jax.reports import figures


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    program.main()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def caption(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


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


MANY_LENGTHS = (*range(1, 101), 200, 500, 1000, 10000)


def at_lengths(lengths, correct=500):
    return {str(n): score(correct, zero_shot=n > 6) for n in lengths}


def scheme(positions, window=False, depth=4, looped=True, **changes):
    """A run whose model knows positions so, of as many loops or layers."""
    kind = "LoopLM" if looped else "GPT"
    model = {"positions": positions, "window": window} | ({} if looped else {"layers": depth})
    name, trained = f"{kind}-{depth}, {positions}, {window}", depth if looped else None
    return results(name, name, trained, changes.pop("loops", trained), model=model, **changes)


def test_one_file_gives_the_generalization_figure_and_the_table(tmp_path, monkeypatch):
    path = written(tmp_path, results())
    run_main(monkeypatch, path, "--out", tmp_path / "new" / "out")
    names = {file.name for file in (tmp_path / "new" / "out").iterdir()}
    assert names == {"generalization.png", "generalization.pdf", "table.md", "table.tex"}
    assert (tmp_path / "new/out/generalization.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new/out/generalization.pdf").read_bytes().startswith(b"%PDF")


def test_all_figures_come_out_the_same_bytes_twice():
    several = [
        results(training=CURVE),
        results(loops=24, training=CURVE),
        results("gpt12", "GPT-12L (Static)", None, None, seed=1, training=CURVE),
    ]
    first = figures.render(gathered(*several)[0])
    assert set(first) == {
        *(
            f"{n}.{k}"
            for n in ("generalization", "test_time_loops", "training")
            for k in ("png", "pdf")
        ),
        "table.md",
        "table.tex",
    }
    assert figures.render(gathered(*several)[0]) == first
    assert b"CreationDate" not in first["generalization.pdf"]


def test_each_system_and_number_of_loops_is_a_line_of_its_own():
    evaluated, repeats = gathered(
        results(), results(loops=24), results("gpt12", "GPT-12L (Static)", None, None)
    )
    figure = figures.draw_generalization(evaluated)
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
    axes = figures.draw_generalization(gathered(results())[0]).axes[0]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    is_open = [mark.get_markerfacecolor() == "white" for mark in marks]
    assert is_open == [n > 6 for n in range(1, 13)]
    assert 6.5 in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]


def test_length_axis_is_logarithmic_only_for_lengths_over_40():
    long = results(lengths={str(n): score(500, zero_shot=n > 6) for n in (1, 40, 1000)})
    short = results(lengths={str(n): score(500, zero_shot=n > 6) for n in (1, 40)})
    scales = [
        figures.draw_generalization(gathered(r)[0]).axes[0].get_xscale() for r in (long, short)
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
    with matplotlib.rc_context(figures.STYLE):
        assert_tick_labels_have_room(figures.draw_generalization(evaluated), needed)
        assert_tick_labels_have_room(figures.draw_schemes(evaluated), needed)
        assert_tick_labels_have_room(figures.draw_schemes(evaluated[:2]), needed)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("lengths", [MANY_LENGTHS, range(1, 102)])
def test_lines_pass_through_all_lengths_but_markers_keep_apart(lengths, count):
    several = [results(f"{i}", f"{i}", lengths=at_lengths(lengths)) for i in range(count)]
    figure = figures.draw_generalization(gathered(*several)[0])
    [axes] = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) == len(lengths)]
    assert len(curves) == count
    assert len(axes.containers) == sum(map(len, markers(axes).values()))
    for curve in curves:
        marked = [inches(axes, mark)[0] for mark in markers(axes)[curve.get_color()]]
        assert np.diff(marked).min() >= figures.MARKER_GAP - 1e-6
        assert 15 <= len(marked) <= 40
        ends = inches(axes, curve)[[0, -1]]
        assert [marked[0], marked[-1]] == pytest.approx(list(ends))


def test_few_lengths_all_have_markers_and_bars():
    evaluated, _ = gathered(results(lengths=at_lengths(range(1, 41))))
    [axes] = figures.draw_generalization(evaluated).axes
    assert [len(marks) for marks in markers(axes).values()] == [40]
    assert len(axes.containers) == 40


def test_several_seeds_are_one_line_and_the_caption_names_them():
    [line], _ = gathered(*(results(seed=s) for s in (0, 2)))
    figure = figures.draw_generalization([line])
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
    figure = figures.draw_schemes(evaluated)
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
        assert {m.get_marker() for m in markers(axes)[colour]} == {figures.MARKERS[1]}
    assert heights == pytest.approx([70, 90, 10])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert "Lengths: every input exactly this long." in caption(figure)


def test_schemes_mark_each_panels_own_trained_lengths():
    short = {str(n): score(500, zero_shot=n > 3) for n in range(1, 13)}
    evaluated, _ = gathered(scheme("rope", lengths=short), scheme("none"))
    for axes, border in zip(figures.draw_schemes(evaluated).axes, (3.5, 6.5), strict=True):
        assert border in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        marks = [mark for found in markers(axes).values() for mark in found]
        is_open = [mark.get_markerfacecolor() == "white" for mark in marks]
        assert is_open == [mark.get_xdata()[0] > border for mark in marks]
        assert 0 < sum(is_open) < len(marks)


def test_many_schemes_stand_three_in_a_row_and_share_the_accuracy_axis():
    evaluated, _ = gathered(*(scheme(f"scheme {i}") for i in range(8)))
    axes = figures.draw_schemes(evaluated).axes
    labelled = [bool(a.get_ylabel()) for a in axes]
    assert labelled == [True, False, False] * 2 + [True, False]
    assert [a.yaxis.get_tick_params()["labelleft"] for a in axes] == labelled


@pytest.mark.parametrize(("systems", "drawn"), [(12, True), (13, False)])
def test_generalization_gives_way_to_schemes_where_there_are_too_many_systems(systems, drawn):
    depths = range(1, systems)
    several = [scheme("none"), *(scheme("rope", depth=depth) for depth in depths)]
    files = figures.render(gathered(*several)[0])
    assert "schemes.png" in files and "schemes.pdf" in files
    assert ("generalization.png" in files) == drawn
    several = [scheme("rope", depth=depth) for depth in range(1, systems + 1)]
    assert {"schemes.png", "generalization.png"} & set(figures.render(gathered(*several)[0])) == {
        "generalization.png"
    }


def test_same_evaluation_twice_is_said(tmp_path, monkeypatch, capsys):
    first = written(tmp_path, results(), "first.json")
    second = written(tmp_path, results(date="2026-11-23"), "second.json")
    run_main(monkeypatch, first, second, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "second.json is the same evaluation as" in printed and "drawn once" in printed


def test_test_time_loops_draws_what_loops_change_and_marks_the_trained_number():
    def at(loops, correct):
        columns = {"1-4": score(1000), "5-6": score(correct), "8": score(0, zero_shot=True)}
        return results(loops=loops, published_columns=columns)

    figure = figures.draw_test_time_loops(gathered(at(24, 900), at(8, 300), at(12, 800))[0])
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

    figure = figures.draw_test_time_loops(gathered(own(12, 100), own(24, 300))[0])
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
    figure = figures.draw_test_time_loops(evaluated)
    # From 10 to 10,000 in seven steps of a factor of 2.68, or what lies nearest.
    expected = [10, 27, 72, 200, 500, 1000, 10000]
    assert legend(figure) == [f"{n} digits" for n in expected]
    assert "less than a point: 1-9 digits (100%). At most 8 lengths a panel" in caption(figure)


def test_eight_lengths_are_all_drawn_over_loops():
    evaluated, _ = gathered(
        *scored_by_loops("Eight", range(9, 18)), *scored_by_loops("One", (1, 200))
    )
    figure = figures.draw_test_time_loops(evaluated)
    assert legend(figure) == [f"{n} digits" for n in (*range(10, 18), 200)]
    assert "Eight: 9 digits (100%); One: 1 digit (100%)." in caption(figure)
    assert "At most" not in caption(figure)


def test_no_loops_figure_without_two_numbers_of_loops_of_one_system():
    evaluated, _ = gathered(results(), results("loop30", "LoopLM-30", 30, 30))
    assert figures.draw_test_time_loops(evaluated) is None


def test_training_draws_each_run_once():
    evaluated, _ = gathered(
        results(training=CURVE),
        results(loops=24, training=CURVE),
        results(seed=1, training=CURVE),
        results("gpt12", "GPT-12L (Static)", None, None),
    )
    figure = figures.draw_training(evaluated)
    assert legend(figure) == ["LoopLM-12 (Dynamic), 2 seeds", "validation loss"]
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(curve.get_ydata()) for curve in curves] == [CURVE["loss"]] * 2
    assert figure.axes[0].get_yscale() == "log"
    assert figures.draw_training(gathered(results())[0]) is None


@pytest.mark.parametrize(
    ("losses", "ticks"),
    [
        ([2.5, 1e-3, 1e-8], {"10⁰", "10⁻⁸"}),
        ([2.5, 1.0, 0.1], {"2", "1", "0.1"}),
        ([2.5, 2.25, 2.0], {"2.1", "2.4"}),
    ],
)
def test_loss_axis_has_a_few_labels_over_any_range(losses, ticks):
    evaluated, _ = gathered(results(training=CURVE | {"loss": losses, "validation_loss": [2.1]}))
    [axes] = figures.draw_training(evaluated).axes
    bottom, top = axes.get_ylim()
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for place, label in labels if bottom <= place <= top]
    assert ticks <= set(shown) and len(shown) <= 10


def test_own_problems_are_drawn():
    own = results(
        lengths={"3": score(9, 10)}, published_columns={}, problems="mine.txt", examples=10
    )
    evaluated, _ = gathered(own, results())
    assert "LoopLM-12 (Dynamic), on mine.txt" in legend(figures.draw_generalization(evaluated))
    assert set(figures.render(gathered(own)[0])) == {"generalization.png", "generalization.pdf"}


def test_dollar_signs_in_names_are_no_formula():
    evaluated, _ = gathered(results("other", r"$\alpha{ and $x"))
    assert "generalization.png" in figures.render(evaluated)


def test_all_files_are_read_before_anything_is_written(tmp_path, monkeypatch):
    good = written(tmp_path, results(), "good.json")
    bad = written(tmp_path, "[]", "bad.json")
    with pytest.raises(InputError, match="bad.json"):
        run_main(monkeypatch, good, bad, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, results())
    monkeypatch.setattr(figures, "render", lambda evaluated: {"a.txt": b"a", "table.md": b""})
    for out in (path, path / "below"):
        with pytest.raises(InputError, match="cannot write into the folder"):
            run_main(monkeypatch, path, "--out", out)
    (tmp_path / "out" / "table.md").mkdir(parents=True)
    with pytest.raises(InputError, match="table.md: it is a folder"):
        run_main(monkeypatch, path, "--out", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["table.md"]


def test_command_line_exits_with_status_2_and_one_message(tmp_path):
    bad = written(tmp_path, "", "bad.json")
    done = run_program("spak_jax.figures", bad, "--out", tmp_path / "out")
    assert_refused(done, f"error: {bad} is empty")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_figures_know_nothing_of_models():
    check = "import sys, spak_jax.figures; sys.exit(bool({'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_nothing_is_written_outside_runs_unless_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(figures, "render", lambda evaluated: {"table.md": "drawn"})
    run_main(monkeypatch, written(tmp_path, results()))
    assert {path.name for path in tmp_path.iterdir()} == {"figures", "runs", "results.json"}
    assert not list((tmp_path / "figures").iterdir())
    assert (tmp_path / "runs" / "figures" / "table.md").read_text() == "drawn"
