"""Specifications are held to their invariants: what ships holds, what is broken is named."""

import contextlib
import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY, assert_refused, optimizing, run_program, with_slow
from results_files import results, score, written

from pallas_kernels import tiles
from pallas_kernels.tuning import aot, attention_case
from pallas_kernels.tuning.cases import ATTENTION, Case
from pallas_kernels.tuning.shapes import Shape
from spak_jax import models, tasks
from spak_jax import tune as command
from spak_jax.command_line import InputError
from spak_jax.config import read_specification
from spak_jax.specs import check, claims, design_space, language, metrics, tune
from spak_jax.specs.gpu_metrics import training_attention
from spak_jax.specs.language import ExpressionError
from spak_jax.specs.page import page as page_of

SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
COMPILER = all(map(importlib.util.find_spec, ("jax_plugins.xla_cuda13", "nvidia.cu13"))) if (
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("nvidia")
) else False  # fmt: skip

# Those that are run and drawn from here: one of each kind and way to know positions. All others are
# by `spak_jax.check`, which `.ci/run` calls with every specification.
THOROUGH = ("gpt12", "loop12", "pointer", "frontier", "parity", "mazes")

INVARIANT = """
[[invariant]]
name = "under-test"
law = "What is under test."
check = {check!r}
"""


FACT = """
[[fact]]
name = "good-at-three"
claim = "Three digits are right."
evidence.run = {evidence!r}
holds = {holds!r}
"""


def learned(tmp_path: Path, evidence: str, holds: str) -> Path:
    """The tiny specification with one fact."""
    path = tmp_path / "configs" / "tiny.toml"
    path.parent.mkdir()
    path.write_text(TINY + FACT.format(evidence=evidence, holds=holds))
    return path


def with_invariant(tmp_path: Path, check: str, name: str = "tiny.toml") -> Path:
    """The tiny specification with one invariant."""
    path = tmp_path / "configs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(TINY + INVARIANT.format(check=check))
    return path


@pytest.fixture(scope="module", autouse=True)
def few_problems():
    """Drawn where `check` draws a million: enough to meet every length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "SAMPLED", 10_000)
        yield


def verdict(path: Path, **more):
    [finding] = check.judge(read_specification(path), path.parent, **more)
    return finding.verdict


@pytest.mark.parametrize(
    "path",
    with_slow(SHIPPED, *(path for path in SHIPPED if path.stem not in ("frontier", "mazes"))),
    ids=lambda path: path.stem,
)
def test_every_shipped_specification_states_invariants_and_none_is_broken(path):
    specification = read_specification(path)
    thorough = path.stem in THOROUGH
    # One invariant limits rounding, of which code that is not optimized has more.
    with optimizing() if path.stem == "frontier" else contextlib.nullcontext():
        findings = check.judge(specification, path.parent, thorough=thorough)
    assert len(findings) >= 4
    for finding in findings:
        assert finding.verdict.holds is not False, (finding.name, check.measured(finding.verdict))
        # Without a target, and before a run, only invariants over those may be open.
        if finding.verdict.holds is None:
            left_open = "kernel|memory|accuracy" + "|sampled|format|halting" * (not thorough)
            assert re.search(left_open, finding.check)
    assert {"zero-shot-is-unseen", "one-format", "training-fits"} <= {f.name for f in findings}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_fact_that_ships_holds_or_says_that_it_is_not_yet_reproduced(path):
    for finding in claims.judge_claims(read_specification(path), path.parent):
        assert finding.verdict.holds or finding.verdict.reason == "not yet reproduced", finding


def test_what_the_baseline_claims_to_have_learned_is_among_the_facts():
    named = {fact.name for path in SHIPPED for fact in read_specification(path).fact}
    assert {
        "aligned-batching", "answer-only-loss", "format-parity", "recurrence-against-stacking",
        "more-loops-at-test-time",
    } <= named  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "invariant"),
    [
        (
            "base/common",
            "bridge_lengths = [5, 6]",
            "bridge_lengths = [5, 8]",
            "zero-shot-is-unseen",
        ),
        ("loop12", "width = 256", "width = 512", "budget"),
        ("loop12", "loops = 12", "loops = 14", "same-work"),
        ("loop12", 'column["5-6"].seeds == 5', 'column["5-6"].seeds == 6', "published-score"),
    ],
)
def test_a_broken_copy_is_caught_with_the_name_of_the_invariant(
    tmp_path, file, old, new, invariant
):
    folder = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", folder)
    shutil.copytree(
        ROOT / "figures/reproduced-256/results", tmp_path / "figures/reproduced-256/results"
    )
    shutil.copytree(ROOT / "figures/results", tmp_path / "figures/results")
    path = folder / f"{file}.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    result = run_program("spak_jax.check", folder / "loop12.toml")
    assert result.returncode == 1, result.stderr
    assert invariant in result.stderr and "Traceback" not in result.stderr
    assert "broken" in result.stdout


def test_one_of_your_own_is_held_to_the_invariants_it_starts_from(tmp_path):
    """That of the README, anywhere; what it is compared with is among those that ship."""
    [own] = re.findall(r"```toml\n(base = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "narrow.toml"
    path.write_text(own)
    findings = check.judge(read_specification(path), path.parent)
    holds = {finding.name: finding.verdict.holds for finding in findings}
    assert {"zero-shot-is-unseen", "fewer-weights", "same-work"} <= holds.keys()
    assert all(found is not False for found in holds.values()) and holds["fewer-weights"]
    path.write_text(own.replace("width = 64", "width = 512"))
    result = run_program("spak_jax.check", path)
    assert result.returncode == 1 and "fewer-weights" in result.stderr


def test_a_fact_falls_with_its_evidence(tmp_path):
    holds = 'run.accuracy["3"].low > 0.7 and run.accuracy["3"].seeds == 2'
    path = learned(tmp_path, "../run*.json", holds)
    specification = read_specification(path)
    [missing] = claims.judge_claims(specification, path.parent)
    assert (missing.verdict.holds, missing.verdict.reason) == (None, "no file ../run*.json")
    for seed in (0, 1):
        written(tmp_path, results(seed=seed), f"run{seed}.json")
    [kept] = claims.judge_claims(specification, path.parent)
    assert kept.verdict.holds is True
    worse = results(seed=1, lengths={"3": score(100)})
    written(tmp_path, worse, "run1.json")
    [fallen] = claims.judge_claims(specification, path.parent)
    assert fallen.verdict.holds is False
    result = run_program("spak_jax.check", path)
    assert result.returncode == 1 and "good-at-three" in result.stderr


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        ("../../../*.json", "must be within"),
        ("/*/*.json", "must be within"),
        ("**/*.json", "and without"),
        ("../linked/*.json", "leads out of"),
        ("../bad.json", "cannot be read as JSON"),
        ("../two*.json", "several evaluations"),
    ],
)
def test_evidence_that_cannot_be_used_is_refused_by_the_name_of_the_fact(tmp_path, evidence, said):
    project = tmp_path / "a" / "b"
    path = project / "configs" / "tiny.toml"
    path.parent.mkdir(parents=True)
    written(tmp_path, results(), "outside.json")
    (project / "linked").symlink_to(tmp_path)
    written(project, "{", "bad.json")
    written(project, results(), "two1.json")
    written(project, results(loops=24), "two2.json")
    path.write_text(
        TINY
        + f'[[fact]]\nname = "odd"\nclaim = "c"\nevidence.x = "{evidence}"\nholds = "x.wrong < 1"\n'
    )
    with pytest.raises(InputError, match=said):
        claims.judge_claims(read_specification(path), path.parent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os').remove('x') == 1", ["under-test", "column 1", "not allowed"]),
        ("parametrs < 1", ["under-test", "no metric parametrs", "parameters"]),
        ("model.depth < 1", ["no metric model.depth", "model.loops"]),
        ("target.colour < 1", ["no metric target.colour", "memory"]),
        ("kernel.embedding.registers < 1", ["no metric kernel.embedding", "attention"]),
        ("kernel.gelu.colour < 1", ["registers"]),
        ('compared["gpt12"].parameters < 1', ["system.compared_with"]),
        ("system.name < 1", ["no metric system.name"]),
    ],
)
def test_an_invariant_that_cannot_be_read_or_speaks_of_nothing_is_refused(tmp_path, text, said):
    path = with_invariant(tmp_path, text)
    assert_refused(run_program("spak_jax.check", path), *said)


def test_an_invariant_of_gpus_is_judged_for_each_target(tmp_path):
    path = with_invariant(tmp_path, "target.memory >= 20_000_000_000")
    assert verdict(path).reason == "no target is given"
    specification = read_specification(path)
    found = check.judge(specification, path.parent, ("rtx5070", "h100"))
    assert [(f.target, f.verdict.holds) for f in found] == [("rtx5070", False), ("h100", True)]


def test_an_invariant_may_speak_of_kernels_of_what_it_is_compared_with(tmp_path, monkeypatch):
    asked = []

    def measure(named, cases):
        asked.append((named, [case.shape for case in cases]))
        registers = sum(case.shape.head_dim for case in cases)
        return [aot.Report(named[0], "fused_row_forward", cases[0], registers, 0, 1024)]

    monkeypatch.setattr(aot, "measure", measure)
    wide = TINY.replace("width = 16", "width = 64").replace('"tiny"', '"wide"')
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "wide.toml").write_text(wide)
    text = 'compared["wide"].kernel.attention.registers == 4 * kernel.attention.registers'
    path = with_invariant(tmp_path, text)
    path.write_text(path.read_text().replace("[system]", '[system]\ncompared_with = ["wide"]'))
    specification = read_specification(path)
    [finding] = check.judge(specification, path.parent, ("h100",))
    assert finding.verdict == language.Verdict(
        True,
        {"compared.wide.kernel.attention.registers": 32, "kernel.attention.registers": 8},
    )
    assert [named for named, _ in asked] == [["h100"], ["h100"]]
    assert verdict(path).reason == "no target is given"


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_evidence_that_is_not_finite_is_none(tmp_path, number):
    file = written(tmp_path, results(name="tiny", lengths={"3": score(900)}), "run.json")
    low = f'"low": {score(900)["low"]}'
    assert file.read_text().count(low) == 1
    file.write_text(file.read_text().replace(low, f'"low": {number}'))
    path = learned(tmp_path, "../run.json", 'run.accuracy["3"].low != 0')
    with pytest.raises(InputError, match="run.json: lengths.3.low.*finite"):
        claims.judge_claims(read_specification(path), path.parent)


def test_results_decide_invariants_of_accuracy(tmp_path):
    path = with_invariant(tmp_path, 'accuracy["3"].low >= 0.7 and wrong > 0')
    assert verdict(path).reason == "no results are given"
    good, bad = (written(tmp_path, results(name="tiny", **more), f"{i}.json") for i, more in
                 enumerate(({}, {"lengths": {"3": score(500)}})))  # fmt: skip
    specification = read_specification(path)
    evaluated = claims.read_evaluated(specification, [good])
    assert verdict(path, evaluated=evaluated).holds is True
    assert run_program("spak_jax.check", path, "--results", bad).returncode == 1
    other = written(tmp_path, results(name="other"), "other.json")
    assert_refused(run_program("spak_jax.check", path, "--results", other), "is of other", "tiny")
    unscored = with_invariant(tmp_path, 'accuracy["99"].low > 0', "unscored.toml")
    found = verdict(unscored, evaluated=evaluated)
    assert (found.holds, found.reason) == (None, 'accuracy["99"] was not scored')


def test_training_refuses_what_its_file_breaks(tmp_path):
    path = with_invariant(tmp_path, "parameters <= 3_370")
    run = tmp_path / "run"
    for overrides in ((), ("train.steps=2",)):
        refused = run_program("spak_jax.train", path, *overrides, "--run", run)
        assert_refused(refused, "under-test", "parameters = ")
        assert not run.exists()
    # What the run is counts, not what it would have been.
    mended = run_program("spak_jax.train", path, "model.loops=2", "train.steps=2", "--run", run)
    assert mended.returncode == 0 and "no longer true" not in mended.stdout, mended.stderr


@pytest.mark.parametrize(
    ("text", "override", "status"),
    [
        pytest.param("train.steps == 12", "train.steps=2", 1, marks=pytest.mark.slow),
        ("model.loops >= 3 and parameters > 0", "model.loops=2", 1),
        # It cannot even be judged any more.
        ("1 / (model.loops - 2) == 1", "model.loops=2", 2),
    ],
)
def test_an_override_may_break_what_the_file_claims(tmp_path, text, override, status):
    path = with_invariant(tmp_path, text)
    steps = "train.steps=2"
    words = ("spak_jax.train", path, *dict.fromkeys((override, steps)), "--run", tmp_path / "run")
    trained = run_program(*words)
    assert trained.returncode == 0, trained.stderr
    [said] = [line for line in trained.stdout.splitlines() if "no longer true" in line]
    assert override in said and "under-test" in said and text in said
    asked = run_program("spak_jax.check", path, override)
    assert asked.returncode == status and "under-test" in asked.stderr
    assert run_program("spak_jax.check", path).returncode == 0


def test_halting_that_forgets_positions_breaks_its_invariant(tmp_path, monkeypatch):
    # The original's mistake.
    path = with_invariant(tmp_path, "halting.difference <= 1e-4")
    assert verdict(path).holds is True
    metrics._halting_difference.cache_clear()
    right = models.LoopLM.halting_logits

    def forgetful(self, tokens, thresholds, **more):
        return right(self, tokens, thresholds, **more, positions=jnp.zeros(tokens.shape, int))

    monkeypatch.setattr(models.LoopLM, "halting_logits", forgetful)
    found = verdict(path)
    metrics._halting_difference.cache_clear()
    assert found.holds is False


def test_scoring_in_another_format_breaks_its_invariant(tmp_path, monkeypatch):
    path = with_invariant(tmp_path, "format.training == format.scoring")
    assert verdict(path).holds is True
    backwards = lambda problems, length, task: task.batch(  # noqa: E731
        problems._replace(inputs=problems.inputs[..., ::-1]), length
    )
    monkeypatch.setattr(metrics, "training_batch", lambda key, data, rows, given: backwards(
        given, data.row_length, tasks.of(data)
    ))  # fmt: skip
    found = verdict(path)
    assert found.holds is False
    assert found.measured["format.training"] != found.measured["format.scoring"]


@pytest.mark.skipif(not COMPILER, reason="needs JAX's GPU plugin and NVIDIA's assembler")
@pytest.mark.slow
def test_tiles_too_large_for_the_card_break_the_invariant_of_the_kernels(tmp_path):
    check_text = "kernel.attention.shared_memory <= target.shared_memory_per_block"
    path = with_invariant(tmp_path, check_text)
    path.write_text(
        path.read_text()
        + "[kernels.flash_forward.rtx5070]\nblock_q = [64]\nblock_k = [256]\n"
        + "num_warps = [8]\nnum_stages = [3]\n"
    )
    text = path.read_text().replace("heads = 2", "heads = 1").replace("width = 16", "width = 64")
    text = text.replace("row_length = 24", "row_length = 512")
    path.write_text(text)
    result = run_program("spak_jax.check", path, "--target", "rtx5070")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "under-test" in result.stderr and "101,376" in result.stdout


def report(case: Case, target: str, **numbers) -> aot.Report:
    return aot.Report(target, case.kernel, case, **({"registers": 9, "shared_memory": 1} | numbers))


SPACE = """
[kernels.fused_row_forward.rtx5070]
num_warps = [1, 2, 4]

[[invariant]]
name = "few-spills"
law = "Hardly any."
check = "kernel.fused_row_forward.spilled <= 8"
"""


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The file of a specification whose invariant forbids one tile, and a table of tiles."""
    path = tmp_path / "configs" / "tiny.toml"
    path.parent.mkdir()
    path.write_text(TINY + SPACE)
    # The tile that the compiler would prefer breaks the invariant.
    spilled = {1: 8, 2: 100, 4: 4}

    def measure(targets, cases):
        return [report(c, targets[0], spilled=spilled[c.settings["num_warps"]]) for c in cases]

    monkeypatch.setattr(aot, "measure", measure)
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "tiles.toml"
    table.write_text(tiles.FILE.read_text())
    monkeypatch.setattr(tiles, "FILE", table)
    return path, table


def test_tuning_by_a_specification_keeps_to_its_invariants_and_adds_a_fact(
    tuned, tmp_path, monkeypatch
):
    path, table = tuned
    words = ["tune", str(path), "--target", "rtx5070", "--write"]
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        command.main()
    specification = read_specification(path)
    # Once, however often it is tuned.
    [fact] = specification.fact
    assert fact.name == "tuned-rtx5070" and "num_warps=4" in fact.claim
    [finding] = claims.judge_claims(specification, path.parent)
    assert finding.verdict.holds is True
    evidence = tmp_path / "figures" / "results" / "tuned_tiny_rtx5070.json"
    found = json.loads(evidence.read_text())
    assert [one["broken"] for one in found["tried"]] == [[], ["few-spills"], []]
    assert "num_warps = 4" in table.read_text()
    found["chosen"]["fused_row_forward"]["spilled"] = 5
    evidence.write_text(json.dumps(found))
    assert claims.judge_claims(specification, path.parent)[0].verdict.holds is False


def test_a_specification_may_use_former_names_of_kernels(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + SPACE.replace("fused_row_forward", "short_forward"))
    declared = design_space.declared_by(read_specification(path))
    assert declared.spaces == {"fused_row_forward": {"rtx5070": {"num_warps": (1, 2, 4)}}}
    few, many = (
        [report(dataclasses.replace(declared.case, kernel="fused_row_forward"), "h100", spilled=n)]
        for n in (8, 9)
    )
    assert design_space.broken_invariants(declared, "h100", few) == []
    assert design_space.broken_invariants(declared, "h100", many) == ["few-spills"]


def test_what_ships_can_be_tuned_by():
    """With the sizes and invariants that it starts from."""
    for path in SHIPPED:
        specification = read_specification(path)
        if training_attention(specification.config) is None:
            with pytest.raises(ExpressionError, match="a GRU of 1 layer: it has no attention"):
                design_space.declared_by(specification)
            continue
        declared = design_space.declared_by(specification)
        assert declared.name == specification.name == path.stem
        assert declared.case == training_attention(specification.config)
        assert "attention-fits" in declared.invariants


def test_tuning_writes_under_runs_unless_it_is_asked_to_write(tuned, tmp_path, monkeypatch, capsys):
    path, table = tuned
    before = path.read_bytes(), table.read_bytes()
    words = ["tune", str(path), "--target", "rtx5070"]
    for more, folder in (([], "runs/tuned"), (["--out", "mine"], "mine")):
        monkeypatch.setattr(sys, "argv", words + more)
        command.main()
        assert (path.read_bytes(), table.read_bytes()) == before
        found = tmp_path / folder
        assert {file.name for file in found.iterdir()} == {"tiles.toml", "tuned_tiny_rtx5070.json"}
        assert "num_warps = 4" in (found / "tiles.toml").read_text()
        printed = capsys.readouterr().out
        assert (
            "num_warps=4" in printed
            and f"{folder}/tiles.toml; the kernels read their own" in printed
        )
    assert {file.name for file in tmp_path.iterdir()} == {"configs", "mine", "runs", "tiles.toml"}

    # What was found before stays; what is no table is not replaced.
    (tmp_path / "mine" / "tiles.toml").write_text(
        table.read_text().replace(
            "[rtx5070.fused_row_forward]", '[rtx5070.fused_row_forward]\n"own" = {}'
        )
    )
    command.main()
    assert '"own" = {  }' in (tmp_path / "mine" / "tiles.toml").read_text()
    for text in ("no = table", "[rtx5070]", "a = 1"):
        (tmp_path / "mine" / "tiles.toml").write_text(text)
        with pytest.raises(InputError):
            command.main()
        assert (tmp_path / "mine" / "tiles.toml").read_text() == text


def test_no_tile_within_the_invariants_is_an_error_that_names_them(tmp_path, monkeypatch):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + SPACE)
    monkeypatch.setattr(
        aot, "measure", lambda targets, cases: [report(c, targets[0], spilled=9) for c in cases]
    )
    declared = design_space.declared_by(read_specification(path))
    with pytest.raises(ExpressionError, match="obeys few-spills"):
        tune.within_invariants(declared, "rtx5070", lambda line: None, timed=False)
    assert_refused(run_program("spak_jax.tune", path, "--target", "b200"), "no design space")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"num_warps": [3]}, "no power of two"),
        ({"warps": [4]}, "its settings are num_warps"),
        ({"num_warps": [4], "block_q": [64]}, "its settings are num_warps"),
    ],
)
def test_a_design_space_has_its_kernels_settings(space, said):
    with pytest.raises(ExpressionError, match=said):
        design_space.tiles_in("fused_row_forward", space)
    with pytest.raises(ExpressionError, match="flash_forward"):
        design_space.tiles_in("mlp", space)


def test_tiles_of_a_space_rise_in_size_and_the_one_in_use_is_kept():
    space = {"block_q": [128, 64], "block_k": [64, 32], "num_warps": [8], "num_stages": [3]}
    sizes = [
        tile["block_q"] * tile["block_k"] for tile in design_space.tiles_in("flash_d_q", space)
    ]
    assert sizes == sorted(sizes) and len(sizes) == 4
    case = Case(ATTENTION, Shape(4, 4096, 16, 64))
    used = attention_case.settings_of("rtx5070", case, "flash_d_q")
    assert used == tiles.streamed("rtx5070", "flash_d_q", 64, 2, with_ids=False)
    own = {name: [value] for name, value in used.items()}
    assert design_space.tile_to_judge("rtx5070", case, "flash_d_q", own) is None
    assert design_space.tile_to_judge("rtx5070", case, "flash_d_q", space | {"num_warps": [4]}) == {
        "block_q": 64, "block_k": 32, "num_warps": 4, "num_stages": 3
    }  # fmt: skip


def test_the_brief_holds_everything_that_a_specification_says():
    path = ROOT / "configs" / "loop12.toml"
    specification = read_specification(path)
    findings = check.judge(specification, path.parent, thorough=False)
    facts = claims.judge_claims(specification, path.parent)
    page = page_of(specification, path, ("rtx5070",), findings, facts)
    for text in (specification.system.objective, "793,600", "num_warps 2, 4, 8", "rtx5070"):
        assert text in page
    for each in (*specification.invariant, *specification.fact):
        assert each.name in page
    # Every row of a table has as many cells as its heading.
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
