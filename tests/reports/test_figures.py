"""The figures program: which files it writes, what is drawn in them, and what it refuses."""

import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, run_program
from drawn_figures import legend
from results_files import CURVE, gathered, results, scheme, score, written

from spak_jax import figures as program
from spak_jax.command_line import InputError
from spak_jax.reports import figures, length_figures


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    program.main()


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


def test_own_problems_are_drawn():
    own = results(
        lengths={"3": score(9, 10)}, published_columns={}, problems="mine.txt", examples=10
    )
    evaluated, _ = gathered(own, results())
    assert "LoopLM-12 (Dynamic), on mine.txt" in legend(
        length_figures.draw_generalization(evaluated)
    )
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
