"""What tiles are chosen by, and how calls are timed; the times themselves need a GPU."""

import dataclasses
import json
import os
import re
import tomllib

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_refused, run_program

from pallas_kernels import tiles
from pallas_kernels.kernel_names import FORMER
from pallas_kernels.tuning import aot, looped_case, looped_tune, timing, tune
from pallas_kernels.tuning.cases import ATTENTION, Case
from pallas_kernels.tuning.shapes import Shape, parse_shape

TINY = Shape(1, 8, 2, 4)


def test_every_candidate_differs_from_the_others():
    tried = tune.candidates(tiles.KERNELS)
    assert len({str(candidate) for candidate in tried}) == len(tried)
    lines = {(candidate.kernel, candidate.key) for candidate in tried}
    for kernel, key in lines:
        assert tiles.settings("h100", kernel, key), f"{kernel}, {key} fills a line nobody reads"


def test_the_fastest_candidate_fills_the_line():
    tried = tune.candidates(["fused_row_forward"])
    seconds = {place: 1e-6 * (1 + (7 * place) % 11) for place in range(len(tried))}
    lines = tune.fastest(tried, seconds, "some GPU")["fused_row_forward"]
    assert set(lines) == {candidate.key for candidate in tried}
    for place, candidate in enumerate(tried):
        line = lines[candidate.key]
        time = min(seconds[i] for i, other in enumerate(tried) if other.key == candidate.key)
        assert line["evidence"].startswith(f"{1e6 * time:.1f} us at {candidate.shape} on some GPU")
        if seconds[place] == time:
            assert {name: line[name] for name in candidate.settings} == candidate.settings


def test_the_fastest_tile_of_all_loops_fills_the_line(monkeypatch):
    tried = looped_tune.candidates()
    assert len({(looped_case.key(case), str(case.settings)) for case in tried}) == len(tried)
    for case in tried:
        assert tiles.settings("h100", tiles.LOOPED, looped_case.key(case)), (
            f"{looped_case.key(case)} is read by nobody"
        )
    costs = {
        (looped_case.key(case), str(case.settings)): 1e-3 * (1 + (7 * i) % 97)
        for i, case in enumerate(tried)
    }
    cost = lambda case: costs[looped_case.key(case), str(case.settings)]  # noqa: E731
    by_key = {looped_case.key(case): [] for case in tried}
    for case in sorted(tried, key=cost):
        by_key[looped_case.key(case)].append(case)
    # The fastest of the first key does not fit, that of the second not with ids.
    first, second, *others = by_key
    unfit, without_ids = by_key[first][0], by_key[second][0]

    def ready(case, _):
        given = looped_case.key(case), case.settings
        if given == (looped_case.key(unfit), unfit.settings):
            return "no room"
        return (
            "no room"
            if case.clip is not None and case.settings == without_ids.settings
            else cost(case)
        )

    monkeypatch.setattr(looped_tune, "candidates", lambda: tried)
    monkeypatch.setattr(looped_tune, "_ready", ready)
    monkeypatch.setattr(
        timing, "medians", lambda programs, _: {i: (0, cost, 0) for i, cost in programs.items()}
    )
    said = []
    lines = looped_tune.fastest("h100", said.append)
    assert set(lines) == set(by_key) and len(said) == len(tried)
    assert {"block_width", "evidence"} <= set(lines[first])
    taken = {
        key: by_key[key].index(
            next(c for c in by_key[key] if c.settings.items() <= lines[key].items())
        )
        for key in by_key
    }
    assert taken == {first: 1, second: 1, **dict.fromkeys(others, 0)}
    assert sum("no room" in line for line in said) == 1


def test_without_the_chip_the_tile_that_spills_least_is_taken(monkeypatch):
    tried = tune.candidates(["fused_row_forward", "fused_row_backward"])
    spills = lambda case: 500 if case.settings["num_warps"] == 4 else 8  # noqa: E731

    def measure(targets, cases):
        return [
            aot.Report(
                targets[0], case.kernel, case, registers=99, spilled=spills(case),
                shared_memory=1, problem="too much" if spills(case) > 256 else None,
            )
            for case in cases
        ]  # fmt: skip

    monkeypatch.setattr(aot, "measure", measure)
    lines = tune.best_compiled(tried, "b200", lambda line: None)["fused_row_forward"]
    assert lines["16 rows, head 64, 16 bits"]["num_warps"] == 1
    assert lines["64 rows, head 64, 16 bits"]["num_warps"] in (2, 8)


def test_a_row_that_is_not_whole_both_ways_is_streamed():
    both = {
        "fused_row_forward": {"a": {}, "b": {}},
        "fused_row_backward": {"b": {}, "c": {}},
        "x": {},
    }
    assert tune.whole_rows(both) == {
        "fused_row_forward": {"b": {}},
        "fused_row_backward": {"b": {}},
        "x": {},
    }


def test_tune_needs_a_gpu_or_a_known_target():
    assert_refused(run_program("pallas_kernels.tune"), "needs a GPU or --target", "cpu")
    assert_refused(run_program("pallas_kernels.tune", "--target", "rtx1"), "rtx1", "b200")
    words = "--target", "b200", "--kernel", tiles.LOOPED
    assert_refused(run_program("pallas_kernels.tune", *words), f"--kernel {tiles.LOOPED}")


def test_tune_names_a_missing_plugin(tmp_path):
    (tmp_path / "jax_plugins").mkdir()
    (tmp_path / "jax_plugins" / "__init__.py").touch()
    result = run_program(
        "pallas_kernels.tune", "--target", "b200", env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert_refused(result, "plugin", "pip install 'spak-jax[aot]'")


def test_a_key_without_a_usable_candidate_is_streamed_but_never_left_without_a_tile():
    tried = tune.candidates(["fused_row_forward", "flash_forward"])
    old = {
        "fused_row_forward": {"64 rows, head 64, 16 bits": {}, "16 rows, head 64, 32 bits": {}},
        "flash_forward": {"head 64, 16 bits": {}},
    }
    assert set(tune.kept_lines(old, "fused_row_forward", tried)) == {"16 rows, head 64, 32 bits"}
    assert tune.kept_lines(old, "flash_forward", tried) == old["flash_forward"]
    assert tune.kept_lines(old, tune.CUDNN, tried) == {}


def test_a_program_makes_every_call_and_drops_none():
    """Counted on the host: calls of the forward pass, whose outputs are the next one's queries."""
    calls = []

    def attention(q, k, v):
        jax.debug.callback(lambda _: calls.append(1), q)
        return q + k * v

    given = timing.inputs(TINY, jnp.float32, 3)
    step = timing.forward_step(attention)
    seconds = timing.SECONDS_PER_PROGRAM / 6
    program = timing.program(step, given.q, given, seconds_a_call=seconds)
    assert program.calls == 6
    program.run()
    jax.effects_barrier()
    assert len(calls) == 6


def test_medians_are_of_one_call():
    slow, fast = (timing.Program(lambda n=n: sum(range(n)), 10) for n in (300_000, 1))
    found = timing.medians({"slow": slow, "fast": fast}, 5)
    for low, median, high in found.values():
        assert 0 < low <= median <= high
    assert found["slow"][1] > 10 * found["fast"][1]


def test_what_a_call_must_move_and_compute():
    shape = Shape(2, 8, 3, 16)
    tensor = 2 * 8 * 3 * 16 * 2
    assert timing.bytes_moved(shape, 2, backward=False) == 4 * tensor
    assert timing.bytes_moved(shape, 2, backward=True) == 11 * tensor
    # Two products of 8 x 16 x 8 a head, half of each above the diagonal.
    assert timing.operations(shape, backward=False) == 2 * (2 * 3) * (2 * 8 * 16 * 8) / 2
    assert timing.operations(shape, backward=True) == 3.5 * timing.operations(shape, backward=False)


@pytest.mark.parametrize("text", ["", "1x2x3", "1x2x3x4x5", "1x2x3x-4", "1x2x0x4", "axbxcxd"])
def test_a_malformed_shape_is_named(text):
    with pytest.raises(Exception, match=f"'{text}'"):
        parse_shape(text)
    assert str(parse_shape("1x2x3x4")) == "1x2x3x4"


def test_the_table_of_tiles_survives_writing():
    table = {"a": {"k": {"16 rows": {"num_warps": 1, "evidence": 'quoted "so"'}}}}
    assert tomllib.loads(tiles.as_text(table)) == table


def test_a_table_of_former_names_is_read(tmp_path):
    text = tiles.FILE.read_text()
    for former, name in FORMER.items():
        text = re.sub(rf"^(\[\w+\.){name}\]$", rf"\1{former}]", text, flags=re.M)
    assert "[h100.short_forward]" in text and "fused_row" not in text
    (tmp_path / "tiles.toml").write_text(text)
    assert tiles.read(tmp_path / "tiles.toml") == tiles.table()


def test_reports_are_plain_values():
    case = Case(ATTENTION, TINY)
    report = dataclasses.replace(aot.Report("b200", "fused_row_forward", case), seconds=1.234)
    assert json.loads(json.dumps(report.as_json()))["compile_seconds"] == 1.23
