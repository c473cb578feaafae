"""The benchmark of attention, and the tables that the README shows."""

import json

import pytest
from conftest import ROOT, assert_refused, run_program

from benchmarks import kernels, report
from pallas_kernels.targets import TARGETS
from pallas_kernels.tuning.shapes import StreamShape, parse_shape


def test_bench_needs_a_gpu():
    assert_refused(run_program("benchmarks.kernels"), "needs a GPU", "cpu")
    assert_refused(run_program("benchmarks.kernels", "--rounds", "1"), "--rounds 1")


def test_the_table_of_a_bench_compares_with_the_best_peer():
    times = {kernels.OURS: 4.0, "xla": 12.0, f"{kernels.EXAMPLE} 64x64": 6.0}
    results = {
        "measurements": [
            {
                "shape": "128x64x4x64",
                "pass": "forward",
                "floor_microseconds": 2.0,
                "microseconds": {name: {"median": time} for name, time in times.items()},
                "missing": {"cudnn": "why"},
            }
        ]
    }
    cells = [list(column.cells)[0] for column in kernels.table(results).columns]
    assert cells[:4] == ["128x64x4x64", "forward", "2.0", "4.0"]
    assert cells[-1] == "1.50"


BENCH = ROOT / "figures" / "results" / "attention_h100.json"
COMPILED = ROOT / "figures" / "results" / "kernels_compile.json"


def test_the_readme_shows_the_committed_tables():
    readme = (ROOT / "README.md").read_text()
    assert report.markdown(json.loads(BENCH.read_text())).strip() in readme
    shapes = [parse_shape("128x64x4x64"), parse_shape("4x4096x16x64"), StreamShape(8192, 256)]
    compiled = json.loads(COMPILED.read_text())
    assert report.markdown(compiled, shapes).strip() in readme
    assert all(kernel["ok"] for kernel in compiled["kernels"])
    assert {kernel["target"] for kernel in compiled["kernels"]} == set(TARGETS)


def test_a_bench_keeps_what_its_file_holds_of_other_shapes(tmp_path):
    results = {"device": "GPU", "jax": "1", "measurements": []}
    entries = [{"shape": "128x64x4x64"}, {"shape": "4x4096x16x64"}]
    path = tmp_path / "bench.json"
    shapes = [parse_shape("128x64x4x64")]
    path.write_text("")
    assert kernels.kept_measurements(path, results, shapes) == []
    path.write_text(json.dumps(results | {"measurements": entries}))
    assert kernels.kept_measurements(path, results, shapes) == entries[1:]
    for text, message in (
        (json.dumps(results | {"device": "other"}), "device = 'other'"),
        ("[]", "something else"),
        ("{}", "something else"),
        ("no JSON", "something else"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            kernels.kept_measurements(path, results, shapes)


def test_a_file_of_another_kind_is_named(tmp_path):
    for text in ("[]", "{}", "no JSON", '{"kernels": [{}]}', '{"kernels": [{"shape": "a"}]}'):
        (tmp_path / "x.json").write_text(text)
        result = run_program("benchmarks.report", tmp_path / "x.json")
        assert_refused(result, "x.json: no results of")
    assert_refused(run_program("benchmarks.report", "missing.json"), "missing.json: cannot")
