"""The figures program: which files it writes, what is in them, and what it refuses."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student_t

from spak_jax import figures
from spak_jax.command_line import InputError

ROOT = Path(__file__).parent.parent
COLUMNS = ("1-4", "5-6", "8", "10", "12")
BOTH_KINDS = ("png", "pdf")


def score(correct, total=1000, zero_shot=False):
    reach = 0.03
    accuracy = correct / total
    return {
        "correct": correct,
        "total": total,
        "accuracy": accuracy,
        "low": max(0.0, accuracy - reach),
        "high": min(1.0, accuracy + reach),
        "zero_shot": zero_shot,
        "mean_steps": 4.0,
    }


def results(name="loop12", system="LoopLM-12 (Dynamic)", trained=12, loops=12, seed=0, **changes):
    """The contents of a results file, as the evaluator writes it."""
    model = {"kind": "loop", "loops": trained} if trained else {"kind": "gpt", "layers": 12}
    made = {
        "system": system,
        "config": {
            "name": name,
            "system": system,
            "model": {"width": 256, **model},
            "data": {"max_digits": 4, "seed": 0},
            "train": {"steps": 100, "seed": seed},
            "evaluation": {"examples": 1000},
        },
        "parameters": 793_600,
        "step": 100,
        "loops": loops,
        "halting": None,
        "method": "teacher forcing",
        "examples": 1000,
        "seed": 0,
        "dtype": "float32",
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-22",
        "commit": "0123456789abcdef+changes",
        "lengths": {str(n): score(1000 - 80 * n, zero_shot=n > 6) for n in range(1, 13)},
        "seed_columns": {c: score(999 - 111 * i, zero_shot=i > 0) for i, c in enumerate(COLUMNS)},
        "carries": {"0": {"accuracy": 0.5}},
        "training": {},
    }
    return made | changes


CURVE = {
    "step": [10, 20, 30],
    "loss": [2.5, 1.0, 0.1],
    "validation_step": [30],
    "validation_loss": [0.2],
    "seconds_per_step": 0.1,
}


def written(folder, values, name="results.json"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def gathered(*all_values):
    files = [
        (Path(f"{i}.json"), figures.Results.model_validate_json(json.dumps(values)))
        for i, values in enumerate(all_values)
    ]
    return figures.gather(files)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    figures.main()


def rows_of(table):
    """The cells of all tables in a Markdown text, by the first cell."""
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            label, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows.setdefault(label, []).append(cells)
    return rows


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
            for k in BOTH_KINDS
        ),
        "table.md",
        "table.tex",
    }
    assert figures.render(gathered(*several)[0]) == first
    assert b"CreationDate" not in first["generalization.pdf"]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


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


def test_seeds_are_one_line_with_students_interval_of_the_mean():
    correct = [700, 800, 750, 900, 650]
    seeds = [
        results(seed=s, lengths={"8": score(c, zero_shot=True)}) for s, c in enumerate(correct)
    ]
    [line], _ = gathered(*reversed(seeds))
    found = line.at_length(8)
    mean = sum(correct) / 5000
    deviation = math.sqrt(sum((c / 1000 - mean) ** 2 for c in correct) / 4)
    reach = student_t.ppf(0.975, 4) * deviation / math.sqrt(5)
    assert found == pytest.approx((mean, mean - reach, mean + reach, 5))
    assert legend(figures.draw_generalization([line])) == ["LoopLM-12 (Dynamic), 5 seeds"]
    assert "Training seeds: 0-4." in figures.markdown_table([line])


def test_interval_over_seeds_stays_within_0_and_1():
    wide = [figures.Score.model_validate(score(c)) for c in (0, 1000)]
    assert figures.estimate(wide) == (0.5, 0.0, 1.0, 2)


def test_one_seed_keeps_its_own_interval_and_no_score_gives_none():
    own = figures.Score.model_validate(score(400))
    assert figures.estimate([own]) == (0.4, own.low, own.high, 1)
    assert figures.estimate([]) is None


def test_same_evaluation_twice_is_drawn_once_and_said(tmp_path, monkeypatch, capsys):
    first = written(tmp_path, results(), "first.json")
    second = written(tmp_path, results(date="2026-11-23"), "second.json")
    run_main(monkeypatch, first, second, "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert "second.json is the same evaluation as" in told and "drawn once" in told
    table = (tmp_path / "out" / "table.md").read_text()
    assert "seeds," not in table and len(rows_of(table)["LoopLM-12 (Dynamic)"]) == 2


def test_other_lengths_of_the_same_run_extend_its_line():
    more = results(lengths={"12": score(999), "16": score(5, zero_shot=True)})
    [line], repeats = gathered(results(), more)
    assert line.lengths == [*range(1, 13), 16]
    assert line.at_length(12).mean == 0.04
    assert not repeats


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"step": 50}, "step 50"),
        ({"method": "decoding"}, "method decoding"),
        ({"dtype": "bfloat16"}, "dtype bfloat16"),
        ({"halting": [0.9, 0.999]}, "halting"),
    ],
)
def test_evaluations_that_differ_are_told_apart(changes, difference):
    evaluated, _ = gathered(results(), results(**changes))
    labels = [line.label for line in evaluated]
    assert len(set(labels)) == 2 and difference in labels[1]


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
    caption = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "1-4 digits (100%), 8-9 digits (0%)" in caption


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


def test_caption_names_device_date_seeds_and_problems():
    figure = figures.draw_generalization(gathered(results(), results(seed=2))[0])
    caption = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "NVIDIA H100 80GB HBM3, 2026-11-22, training seeds 0, 2, 1,000 problems" in caption


def test_table_holds_our_numbers_beside_the_seeds():
    systems = {
        ("gpt12", "GPT-12L (Static)", None, None): "61.90",
        ("loop12", "LoopLM-12 (Dynamic)", 12, 12): "80.00",
        ("loop30", "LoopLM-30 (Deep Thinking)", 30, 30): "95.24",
        ("loop128e", "LoopLM-128e (Efficient)", 24, 24): "76.19",
        ("loop12", "LoopLM-12 (Dynamic)", 12, 24): "78.10",
        ("loop12-w768", "LoopLM-12 (Dynamic), 768 wide", 12, 12): "-",
    }
    evaluated, _ = gathered(*(results(*system) for system in systems))
    table = figures.markdown_table(evaluated)
    rows = rows_of(table)
    for (name, system, trained, loops), published in systems.items():
        by_column, by_length = rows[system if loops == trained else f"{system} at 24 loops"]
        assert by_column[0] == "793,600"
        assert by_column[1::2] == [
            "99.90 [96.9, 100.0]",
            "88.80 [85.8, 91.8]",
            "77.70 [74.7, 80.7]",
            "66.60 [63.6, 69.6]",
            "55.50 [52.5, 58.5]",
        ]
        eight = {"loop30": "2.59", "loop12-w768": "-"}.get(name, "0.00")
        assert by_column[4] == published and by_column[6] == eight
        assert by_length == [
            "44.00 [41.0, 47.0]",
            "36.00 [33.0, 39.0]",
            "20.00 [17.0, 23.0]",
            "4.00 [1.0, 7.0]",
        ]
    for told in (
        "Device: NVIDIA H100 80GB HBM3. Date: 2026-11-22. Commit: 0123456789ab+changes.",
        "Training seeds: 0. Problems per length: 1,000.",
        "5-6 really holds 5, 6 and 7 digits, 8 holds 8 and 9, 10 holds 10 and 11",
    ):
        assert told in table


def test_halting_is_not_set_beside_a_published_number_scored_without():
    [line], _ = gathered(results(halting=[0.9, 0.999]))
    assert figures.table_rows([line])[0].published == [None] * 5


def test_only_strict_lengths_that_were_scored_have_a_column():
    partly = results(lengths={"8": score(10, zero_shot=True), "9": score(5, zero_shot=True)})
    evaluated, _ = gathered(partly)
    headings = rows_of(figures.markdown_table(evaluated))["system"]
    assert headings[1] == ["8 digits"]
    assert r"both operands exactly & 8 digits \\" in figures.latex_table(evaluated)


def test_own_problems_are_drawn_but_have_no_row():
    own = results(lengths={"3": score(9, 10)}, seed_columns={}, problems="mine.txt", examples=10)
    evaluated, _ = gathered(own, results())
    assert "LoopLM-12 (Dynamic), on mine.txt" in legend(figures.draw_generalization(evaluated))
    assert "mine.txt" not in figures.markdown_table(evaluated)
    assert set(figures.render(gathered(own)[0])) == {"generalization.png", "generalization.pdf"}


def test_names_are_escaped():
    evaluated, _ = gathered(results("other", r"50% & a_b|c #1 \x {y} $z$"))
    latex = figures.latex_table(evaluated)
    expected = r"50\% \& a\_b\textbar{}c \#1 \textbackslash{}x \{y\} \$z\$"
    assert f"{expected} & 793,600 & 99.90 & -- &" in latex
    assert r"a\_b\|c" in figures.markdown_table(evaluated)
    # Dollar signs are no formula in the figures either.
    assert "$z$" in legend(figures.draw_generalization(evaluated))[0]


def test_latex_rows_have_as_many_cells_as_the_heading():
    evaluated, _ = gathered(results(), results("gpt12", "GPT-12L (Static)", None, None))
    latex = figures.latex_table(evaluated)
    first, second = latex.split(r"\bottomrule")[:2]
    for part, cells in ((first, 12), (second, 5)):
        body = part.split(r"\midrule")[1].strip().splitlines()
        assert len(body) == 4
        assert all(row.count("&") == cells - 1 and row.endswith(r"\\") for row in body)


def without(path):
    values = copy.deepcopy(results())
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return json.dumps(values)


def changed(path, value):
    values = copy.deepcopy(results(training=copy.deepcopy(CURVE)))
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return json.dumps(values)


BAD = {
    "empty": ("", "empty"),
    "white": (" \n", "empty"),
    "no JSON": ("{'a': 1}", "not JSON"),
    "cut short": (json.dumps(results())[:300], "not JSON"),
    "binary": ("\x00\x01", "not JSON"),
    "list": ("[]", "expected an object"),
    "number": ("3", "expected an object"),
    "nested": ("[" * 5000, "JSON"),
    "no lengths": (without("lengths"), "lengths is missing"),
    "no columns": (without("seed_columns"), "seed_columns is missing"),
    "no seed": (without("config.train.seed"), "config.train.seed is missing"),
    "no low": (without("lengths.8.low"), "lengths.8.low is missing"),
    "text for a number": (changed("parameters", "many"), "parameters = 'many'"),
    "no system": (changed("system", ""), "system = ''"),
    "no date": (changed("date", "yesterday"), "date = 'yesterday'"),
    "no length": (changed("lengths", {}), "lengths = {}"),
    "length in words": (changed("lengths.eight", score(1)), "lengths.eight"),
    "length 0": (changed("lengths.0", score(1)), "lengths.0"),
    "list for lengths": (changed("lengths", [1]), "lengths = [1]"),
    "NaN": (changed("lengths.8.accuracy", math.nan), "lengths.8.accuracy = nan"),
    "over 1": (changed("lengths.8.accuracy", 1.5), "lengths.8.accuracy = 1.5"),
    "below 0": (changed("seed_columns.5-6.low", -0.1), "seed_columns.5-6.low = -0.1"),
    "infinite": (changed("lengths.8.high", math.inf), "lengths.8.high = inf"),
    "boolean": (changed("lengths.8.accuracy", True), "lengths.8.accuracy = True"),
    "other accuracy": (changed("lengths.8.accuracy", 0.35), "lengths.8: accuracy = 0.35"),
    "outside interval": (changed("lengths.8.low", 0.5), "lengths.8: low = 0.5"),
    "no problems": (changed("lengths.8.total", 0), "lengths.8.total = 0"),
    "no loops": (changed("loops", None), "loops = None"),
    "loops 0": (changed("loops", 0), "loops = 0"),
    "NaN loss": (changed("training.loss", [1.0, math.nan, 1.0]), "training.loss.1 = nan"),
    "lost loss": (changed("training.loss", [1.0]), "training: 3 values in step, 1 in loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results_are_refused_by_file_and_key_before_anything_is_written(
    case, tmp_path, monkeypatch
):
    content, told = BAD[case]
    good = written(tmp_path, results(), "good.json")
    bad = written(tmp_path, content, "bad.json")
    with pytest.raises(InputError) as refusal:
        run_main(monkeypatch, good, bad, "--out", tmp_path / "out")
    message = str(refusal.value)
    assert str(bad) in message and told in message and "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["absent.json", "."])
def test_what_is_no_file_is_refused(path, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot read the results file"):
        run_main(monkeypatch, tmp_path / path, "--out", tmp_path / "out")
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
    bad = written(tmp_path, without("lengths"), "bad.json")
    command = [sys.executable, "-m", "spak_jax.figures", str(bad), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bad}: lengths is missing")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_figures_know_nothing_of_models():
    check = "import sys, spak_jax.figures; sys.exit(bool({'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


@st.composite
def scores(draw):
    total = draw(st.integers(1, 10**6))
    correct = draw(st.integers(0, total))
    accuracy = correct / total
    return score(correct, total, draw(st.booleans())) | {
        "low": draw(st.floats(0, accuracy)),
        "high": draw(st.floats(accuracy, 1)),
    }


@st.composite
def valid_results(draw):
    trained = draw(st.none() | st.integers(1, 100))
    lengths = draw(st.dictionaries(st.integers(1, 1000).map(str), scores(), min_size=1, max_size=4))
    columns = st.dictionaries(st.sampled_from([*COLUMNS, "another"]), scores(), max_size=3)
    return results(
        draw(st.sampled_from(["gpt12", "loop12", "x"])),
        draw(st.text(min_size=1, max_size=12)),
        trained,
        trained and draw(st.integers(1, 100)),
        draw(st.integers(0, 2)),
        lengths=lengths,
        seed_columns=draw(columns),
        halting=draw(st.none() | st.just([0.9, 0.999])),
        commit=draw(st.none() | st.text(min_size=1, max_size=8)),
        problems=draw(st.sampled_from([None, None, None, "mine.txt"])),
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(valid_results(), min_size=1, max_size=5))
def test_any_valid_results_give_tables_with_a_row_for_each_system(several):
    evaluated, _ = gathered(*several)
    shown = figures.table_rows(evaluated)
    assert len(shown) == sum(not line.first.problems for line in evaluated)
    if shown:
        table = figures.markdown_table(evaluated)
        by_column = table.split("\n\n")[1].split("\n")
        assert len(by_column) == 2 + len(shown)
        assert len({len(line) for line in by_column}) == 1
        latex = figures.latex_table(evaluated)
        body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().split("\n")
        assert len(body) == 2 * len(shown)
