"""The figures program: which files it writes, what is drawn in them, and what it refuses."""

import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, run_program
from results_files import CURVE, gathered, results, score, written

from spak_jax import figures
from spak_jax.command_line import InputError


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    figures.main()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def caption(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


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


def test_several_seeds_are_one_line_and_the_caption_names_them():
    [line], _ = gathered(*(results(seed=s) for s in (0, 2)))
    figure = figures.draw_generalization([line])
    assert legend(figure) == ["LoopLM-12 (Dynamic), 2 seeds"]
    told = "NVIDIA H100 80GB HBM3, 2026-11-22, training seeds 0, 2, 1,000 problems a length"
    assert told in caption(figure)
    assert "Student intervals of the mean over training seeds" in caption(figure)


def test_same_evaluation_twice_is_said(tmp_path, monkeypatch, capsys):
    first = written(tmp_path, results(), "first.json")
    second = written(tmp_path, results(date="2026-11-23"), "second.json")
    run_main(monkeypatch, first, second, "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert "second.json is the same evaluation as" in told and "drawn once" in told


def test_test_time_loops_draws_what_loops_change_and_marks_the_trained_number():
    def at(loops, correct):
        columns = {"1-4": score(1000), "5-6": score(correct), "8": score(0, zero_shot=True)}
        return results(loops=loops, seed_columns=columns)

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
        return results(loops=loops, lengths=lengths, seed_columns={}, problems="mine.txt")

    figure = figures.draw_test_time_loops(gathered(own(12, 100), own(24, 300))[0])
    assert legend(figure) == ["3 digits"]


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
    own = results(lengths={"3": score(9, 10)}, seed_columns={}, problems="mine.txt", examples=10)
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
