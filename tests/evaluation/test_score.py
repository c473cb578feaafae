"""Scoring: teacher forcing is generation, lengths and intervals are right, bad input is refused."""

import contextlib
import functools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, assert_refused, run_program, tiny_config, with_slow
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spak_jax import models
from spak_jax.command_line import InputError, console, parse_lengths
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.data import sample_published_columns
from spak_jax.evaluation import batching, calibration, generate
from spak_jax.evaluation import score as score_module
from spak_jax.evaluation.answers import solve
from spak_jax.evaluation.batching import padded_length, rows_per_call
from spak_jax.evaluation.forward import PUBLISHED_HALTING, Halting, forward
from spak_jax.evaluation.loaded import LoadedModel, load
from spak_jax.evaluation.problems_file import read_problems
from spak_jax.evaluation.results import read_results, write_results
from spak_jax.evaluation.score import Scorer, Settings, score
from spak_jax.evaluation.statistics import Predictions, summary
from spak_jax.reports.grouping import gather
from spak_jax.reports.scores import print_results, warn_of_loops
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import checkpoint
from spak_jax.training.loop import train
from spak_jax.training.step import initial_state

ADDITION = Addition()

LENGTH = 40


def erring_model(strength):
    """A causal stand-in for a model: the true next token, disturbed by a hash of all before it."""

    def run(weights, tokens):
        problems, salt = weights
        truth = jnp.pad(ADDITION.render(problems, LENGTH)[0], [(0, 0), (0, 1)])[:, 1:]
        place = jnp.arange(tokens.shape[1])
        history = jnp.cumsum(tokens * (place + 3) ** 2 * 7919 + salt, axis=1)
        noise = jax.vmap(jax.vmap(lambda h: jax.random.normal(jax.random.key(h), (13,))))(history)
        logits = 6 * jax.nn.one_hot(truth[:, : tokens.shape[1]], 13) + strength * noise
        return logits, history % 5

    return run


@jax.jit
def forced_and_decoded(problems, strength, salt):
    weights, run = (problems, salt), erring_model(strength)
    batch = ADDITION.batch(problems, LENGTH - 1)
    write = functools.partial(generate.generate, generate.without_cache(run), ADDITION.end)
    forced = score_module._teacher_forced(run, weights, batch)
    return *forced, *score_module._decoded(write, weights, batch)


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([0.5, 2.0, 2.5, 4.0]), st.integers(0, 2**20))
def test_teacher_forcing_equals_generation(strength, salt):
    """Any causal model, right or wrong: the same problems count, with the same loops."""
    problems = ADDITION.sample_exact(jax.random.key(salt), 9, 64)
    forced, forced_steps, decoded, decoded_steps = map(
        np.asarray, forced_and_decoded(problems, strength, salt)
    )
    assert (forced == decoded).all()
    # Where a generation went wrong it read other text from there on, and so did the counts.
    np.testing.assert_array_equal(forced_steps[forced], decoded_steps[decoded])
    if strength == 2.5:
        assert 0 < forced.mean() < 1


CONVERGENCE = Halting("convergence", 0.7, 0.7)


@pytest.mark.parametrize("halt", [None, PUBLISHED_HALTING, CONVERGENCE])
def test_decoding_a_trained_model_equals_teacher_forcing(half_trained, halt):
    trained = load(half_trained)
    problems = ADDITION.sample_exact(jax.random.key(0), 1, 300)
    outcomes = [
        Scorer(trained, Settings((1,), 300, 0, halt=halt, decode=decode))(problems)
        for decode in (False, True)
    ]
    assert (outcomes[0].correct == outcomes[1].correct).all()
    assert 0.05 < outcomes[0].correct.mean() < 0.999
    loops = outcomes[0].loops
    assert (loops == 3).all() if not halt else 1 <= loops.mean() < 3


def test_scores_do_not_depend_on_how_many_are_scored_together(half_trained):
    trained = load(half_trained)
    scorer = Scorer(trained, Settings((1,), 1, 0))
    problems = ADDITION.sample_exact(jax.random.key(1), 1, 700)
    whole = scorer(problems)
    part = scorer(jax.tree.map(lambda array: array[600:613], problems))
    assert (whole.correct[600:613] == part.correct).all()
    assert len(whole.correct) == 700


def test_scores_count_whole_answers_by_hand(half_trained, tmp_path):
    trained = load(half_trained)
    results = score(trained, Settings((1, 2), 150, 3))
    problems = ADDITION.sample_exact(jax.random.fold_in(jax.random.key(3), 1), 1, 150)
    definition, _ = models.abstract(trained.config)
    batch = ADDITION.batch(problems, 32)
    run = jax.jit(lambda weights, tokens: nnx.merge(definition, weights)(tokens).argmax(-1))
    chosen = np.asarray(run(trained.weights, batch.tokens))
    right = [
        all(c == t for c, t, m in zip(*row, strict=True) if m)
        for row in zip(chosen, np.asarray(batch.targets), np.asarray(batch.answer), strict=True)
    ]
    line = results.lengths["1"]
    assert (line.correct, line.total, line.zero_shot) == (sum(right), 150, False)
    assert results.lengths["2"].zero_shot
    assert sum(part.total for part in results.measures["carries"].values()) == 300
    assert sum(part.total for part in results.published_columns.values()) == 1_500
    assert results.loops == 3 and results.parameters == 32 * (12 * 32 + 13 + 3 + 3)
    path = tmp_path / "results.json"
    write_results(path, results)
    assert read_results(path) == results


def test_wilson_interval():
    """Against the closed form (Wilson 1927) at z = 1.959964."""
    outcome = Predictions(np.arange(116) < 3, np.zeros(116, np.float32))
    line = summary(outcome)
    p, n, z = 3 / 116, 116, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    np.testing.assert_allclose(
        [line["accuracy"], line["low"], line["high"]],
        [p, (centre - half) / scale, (centre + half) / scale],
    )


def test_loops_at_test_time(half_trained):
    trained = load(half_trained)
    tokens = jnp.array([ADDITION.encode("1+2=3\n")])
    logits, taken = forward(trained.config, loops=7)(trained.weights, tokens)
    definition, _ = models.abstract(trained.config)
    expected = nnx.merge(definition, trained.weights)(tokens, loops=7)
    np.testing.assert_array_equal(logits, expected)
    assert (taken == 7).all()


def test_a_stack_has_no_loops_to_choose():
    config = tiny_config()
    values = config.model_dump(mode="json") | {
        "model": {"kind": "gpt", "width": 16, "heads": 2, "layers": 2}
    }
    from spak_jax.config import parse_config

    gpt = parse_config(values, "test")
    trained = LoadedModel(gpt, nnx.state(models.build(gpt, jax.random.key(0))), 0)
    for options in ({"loops": 3}, {"halt": PUBLISHED_HALTING}):
        with pytest.raises(InputError, match="stack of 2 blocks"):
            forward(trained.config, **options)
    results = score(trained, Settings((1,), 5, 0))
    assert results.loops is None


@pytest.mark.parametrize(
    ("text", "expected"), [("1-3,16,24", (1, 2, 3, 16, 24)), ("7", (7,)), ("3, 1,2-3", (1, 2, 3))]
)
def test_parse_lengths(text, expected):
    assert parse_lengths("--lengths", text, MAX_LENGTH) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "0", "3-1", "1-", "-3", "1,,2", "10001", "1-20000", "1.5"]
)
def test_parse_lengths_refuses(text):
    with pytest.raises(InputError, match="--lengths"):
        parse_lengths("--lengths", text, MAX_LENGTH)


BAD_PROBLEMS = {
    "letters": (b"1+2\nfoo+1\n", "line 2"),
    "negative": (b"1+-2\n", "line 1"),
    "empty line": (b"1+2\n\n3+4\n", "line 2: empty"),
    "wrong answer": (b"1+2=4\n", "is wrong: it is 3"),
    "no last newline": (b"1+2\n3+4", "line 2: no newline"),
    "windows": (b"1+2\r\n", "line 1: ends as on Windows"),
    "10 MB of digits": (b"7" * 10_000_000, "line 1: longer than any problem"),
    "10,001 digits": (b"1" * 10_001 + b"+1\n", "at most 10000"),
    "nothing": (b"", "holds no problem"),
    "binary": (b"\xff\xfe\x00\n", "line 1"),
}


@pytest.mark.parametrize("content", BAD_PROBLEMS)
def test_a_bad_problems_file_is_refused(tmp_path, content):
    path = tmp_path / "problems.txt"
    written, said = BAD_PROBLEMS[content]
    path.write_bytes(written)
    with pytest.raises(InputError, match=said) as refused:
        read_problems(str(path), ADDITION)
    assert "problems.txt" in str(refused.value) and len(str(refused.value)) < 400


@settings(max_examples=300)
@given(st.binary(max_size=40))
def test_any_problems_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert read_problems(str(path), ADDITION)


def test_a_good_problems_file(tmp_path):
    path = tmp_path / "problems.txt"
    longest = "9" * 100
    path.write_text(f"123+456\n1+2=3\n{longest}+{longest}={2 * int(longest)}\n")
    assert read_problems(str(path), ADDITION) == [("123", "456"), ("1", "2"), (longest, longest)]


def test_the_command_line(half_trained, tmp_path):
    out = tmp_path / "out.json"
    result = run_program(
        "spak_jax.evaluate",
        half_trained,
        "--lengths",
        "1,8",
        "--examples",
        "30",
        "--loops",
        "4",
        "--halt",
        "published",
        "--seed",
        "5",
        "--json",
        out,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(out.read_text())
    assert list(results["lengths"]) == ["1", "8"] and results["lengths"]["8"]["total"] == 30
    assert results["loops"] == 4 and results["halting"] == [0.9, 0.999]
    assert results["halting_rule"] == "confidence"
    assert "warning: --halt published: the original's thresholds lose answers" in result.stdout
    assert "note: 4 loops, 3 in training" in result.stdout
    assert "training seed 0, 4 loops, step 220: whole answers right" in result.stdout
    assert results["training"]["validation_step"] == [110, 220]
    assert results["training"]["step"][-1] == 220

    result = run_program(
        "spak_jax.evaluate", half_trained, "--problems", "-", "--json", out, input="1+2\n99+1=100\n"
    )
    assert result.returncode == 0, result.stderr
    assert {n: line["total"] for n, line in json.loads(out.read_text())["lengths"].items()} == {
        "1": 1,
        "2": 1,
    }
    (written,) = re.findall(r"^wrong: 99\+1=(.*), right: 100$", result.stdout, re.MULTILINE)
    assert written == solve(load(half_trained), [("99", "1")])[0].text != "100"


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ((), "convergence"),
        pytest.param(("confidence",), "confidence", marks=pytest.mark.slow),
    ],
)
def test_halting_is_calibrated_for_the_model(words, rule, half_trained, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATED_ON", 200)
    command = ("spak_jax.evaluate", half_trained, "--lengths", "1", "--examples", "20")
    result = run_program(*command, "--json", tmp_path / "x.json", "--halt", *words)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "x.json").read_text())
    expected = calibration.calibrated(load(half_trained), rule)
    assert results["halting"] == [expected.before, expected.after] and expected.rule == rule
    assert results["halting_rule"] == expected.rule
    assert f"halting by {expected.rule}, calibrated" in result.stdout
    assert ("warning" in result.stdout) == (rule == "confidence")


@pytest.mark.parametrize(("loops", "free"), [(4, 0), (4, 6), (3, 0), (2, 0)])
def test_more_loops_than_in_training_are_remarked_on(loops, free, capsys):
    warn_of_loops({"loops": 3, "no_grad_warmup_loops": free}, loops)
    said = "4 loops, 3 in training: this model was not trained to be repeated"
    assert (said in capsys.readouterr().out) == (loops > 3 and not free)


def test_a_column_is_zero_shot_only_where_all_of_it_is(half_trained):
    """The column "5-6" was called zero-shot, most of whose problems have trained lengths."""
    problems = sample_published_columns(jax.random.key(0), 4_000, ADDITION)
    longer = np.asarray(ADDITION.lengths(problems))

    class NothingRight:
        task = ADDITION

        def __call__(self, problems, advance):
            return Predictions(np.zeros(4_000, bool), np.ones(4_000, np.float32))

    columns = score_module._by_column(NothingRight(), problems, 6, None)
    assert {name: line["zero_shot"] for name, line in columns.items()} == {
        "1-4": False, "5-6": False, "8": True, "10": True, "12": True,
    }  # fmt: skip
    assert columns["1-4"]["trained_share"] == 1 and columns["8"]["trained_share"] == 0
    inside = ((longer == 5) | (longer == 6)).sum() / ((longer >= 5) & (longer <= 7)).sum()
    assert columns["5-6"]["trained_share"] == pytest.approx(inside) == pytest.approx(0.6, abs=0.1)
    results = score(load(half_trained), Settings((1,), 30, 0))
    column = results.published_columns["5-6"]
    assert column.zero_shot
    changed = column.model_copy(update={"zero_shot": False, "trained_share": 0.6093})
    results = results.model_copy(update={"published_columns": {"5-6": changed}})
    with console.capture() as said:
        print_results(results)
    (line,) = [line for line in said.get().splitlines() if "5-6" in line]
    assert "60.9% trained lengths" in line and "zero-shot" not in line


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """A folder of two seeds, with one that never saved a checkpoint beside them."""
    config = tiny_config(train={"seed": 9, "seeds": 2, "steps": 2, "checkpoint_every": 2})
    run = tmp_path_factory.mktemp("two")
    train(config, run)
    (run / "seed3").mkdir()
    return run


@pytest.mark.parametrize("program", ["solve", "trace", "halting"])
def test_a_folder_of_seeds_names_them(program, two_seeds):
    words = ["1+2"] if program != "halting" else []
    result = run_program(f"spak_jax.{program}", two_seeds, *words)
    # The tenth after the ninth.
    assert_refused(result, f"{two_seeds} holds", f"{two_seeds / 'seed9'}, {two_seeds / 'seed10'}")
    assert "seed3" not in result.stderr


def test_the_seeds_of_a_folder_are_scored_together(two_seeds, tmp_path):
    command = ("spak_jax.evaluate", two_seeds, "--lengths", "1", "--examples", "50")
    result = run_program(*command, "--json", tmp_path / "two.json")
    assert result.returncode == 0, result.stderr
    paths = [tmp_path / f"two-seed{seed}.json" for seed in (9, 10)]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    (line,), _ = gather([(path, read_results(path)) for path in paths])
    assert [results.config.train.seed for results in line.results] == [9, 10]
    for seed in (9, 10):
        assert f"training seed {seed}, 3 loops" in result.stdout
    _, over_seeds = result.stdout.split("mean over training seeds 9-10, 3 loops")
    for name, found in (("1", line.at_length(1)), ("published 5-6", line.in_column("5-6"))):
        (row,) = [row for row in over_seeds.splitlines() if row.split("│")[1:2] == [f"{name:>14} "]]
        assert f"{found.low:.1%} - {found.high:.1%}" in row and f"{found.mean:.1%}" in row
    assert "Student intervals" in over_seeds


def test_kinds_and_long_numbers_are_scored(half_trained):
    trained = load(half_trained)
    settings = Settings((1, 150), 30, 0, kinds=ADDITION.kinds)
    results = score(trained, settings)
    # Beyond 100 digits fewer problems: as many digits.
    assert {n: line.total for n, line in results.lengths.items()} == {"1": 30, "150": 20}
    totals = {
        kind: [line.total for line in lines.values()] for kind, lines in results.kinds.items()
    }
    # Of each kind a tenth.
    assert totals == {"nines": [2, 2]} | {kind: [3, 2] for kind in ADDITION.kinds[1:]}
    scorer = Scorer(trained, settings)
    random = np.random.default_rng((0, 1, 1))
    outcome = scorer(ADDITION.sample_kind(random, ADDITION.kinds[1], 1, 3))
    assert results.kinds["all-carry"]["1"].correct == outcome.correct.sum()
    assert results.kinds["all-carry"]["150"].zero_shot


def test_all_that_is_scored_is_drawn_by_the_seed_each_by_itself(half_trained, monkeypatch):
    columns, states = [], []
    of_columns, of_kind = sample_published_columns, Addition.sample_kind

    def columns_drawn(key, *more):
        problems = of_columns(key, *more)
        columns.append(np.asarray(problems.inputs).tobytes())
        return problems

    def kind_drawn(task, random, *more):
        states.append(str(random.bit_generator.state))
        return of_kind(task, random, *more)

    monkeypatch.setattr(score_module.data, "sample_published_columns", columns_drawn)
    monkeypatch.setattr(Addition, "sample_kind", kind_drawn)
    trained = load(half_trained)
    for seed in (0, 0, 1):
        score(trained, Settings((1, 2), 10, seed, kinds=ADDITION.kinds))
    assert columns[0] == columns[1] != columns[2]
    once = 2 * len(ADDITION.kinds)
    assert states[:once] == states[once : 2 * once]
    assert len(set(states)) == 2 * once


def test_long_rows_are_scored_a_few_at_a_time():
    assert rows_per_call(32) == batching.ROWS_PER_CALL
    lengths = [padded_length(length, ADDITION) for length in (1, 9, 100, 1_000, 10_000)]
    assert lengths == [16, 32, 304, 3_072, 30_720]
    for length in lengths:
        rows = rows_per_call(length)
        assert rows >= 1 and rows & (rows - 1) == 0
        assert rows == 1 or rows * length**2 <= batching.SCORES_PER_CALL


def test_decoding_takes_no_more_rows_than_caches_hold(half_trained, monkeypatch):
    trained = load(half_trained)
    problems = ADDITION.sample_exact(jax.random.key(2), 1, 50)
    whole, few = (Settings((1,), 50, 0, decode=True, loops=loops) for loops in (3, 4))
    assert Scorer(trained, whole)._rows_per_call(16) == batching.ROWS_PER_CALL
    # Of 4 loops, keys and values of 20 rows of 17 tokens, 32 wide: a power of two of them.
    monkeypatch.setattr(generate, "CACHED_NUMBERS", 2 * 4 * 20 * 17 * 32)
    scorer = Scorer(trained, few)
    assert scorer._rows_per_call(16) == 16
    forced = Scorer(trained, Settings((1,), 50, 0, loops=4))(problems)
    assert (scorer(problems).correct == forced.correct).all()


@pytest.mark.parametrize("task", with_slow(["subtraction", "three-operands"], "three-operands"))
def test_other_tasks_are_scored_and_solved(task, tmp_path):
    config = tiny_config(data={"task": task, "row_length": 40})
    state = jax.jit(lambda: initial_state(config))()
    checkpoint.Run(tmp_path).save(0, config, state.weights)
    trained = load(tmp_path)
    asked = {"subtraction": ("31", "9"), "three-operands": ("3", "40", "5")}[task]
    (answer,) = solve(trained, [asked])
    outcome = Scorer(trained, Settings((2,), 1, 0))(trained.task.arrays([asked]))
    assert (answer.text == trained.task.solve(asked)) == outcome.correct[0]
    results = score(trained, Settings((1, 2), 20, 0))
    assert results.config.data["task"] == task and results.lengths["2"].total == 20
    problem = trained.task.format(asked)
    result = run_program("spak_jax.solve", tmp_path, problem)
    assert result.returncode == 0 and problem in result.stdout
    assert_refused(run_program("spak_jax.evaluate", tmp_path, "--kinds"), "--kinds", task)
    assert_refused(run_program("spak_jax.solve", tmp_path, "1+2"), "1+2")


def test_the_command_line_refuses(half_trained, tmp_path):
    assert_refused(run_program("spak_jax.evaluate", tmp_path / "none"), "none")
    before = sorted(half_trained.rglob("*"))
    assert_refused(run_program("spak_jax.evaluate", half_trained, "--loops", "0"), "--loops 0")
    (tmp_path / "file").touch()
    assert_refused(
        run_program("spak_jax.evaluate", half_trained, "--json", tmp_path / "file" / "x.json"),
        "cannot write",
    )
    assert sorted(half_trained.rglob("*")) == before


def test_solve(half_trained):
    result = run_program("spak_jax.solve", half_trained, "4+3", "0+0", "99+1")
    assert result.returncode == 0, result.stderr
    assert "4+3" in result.stdout and "right" in result.stdout + "right"
    assert "wrong: 100" in result.stdout
    assert_refused(run_program("spak_jax.solve", half_trained, "4-3"), "4-3")
    assert_refused(run_program("spak_jax.solve", half_trained.parent / "none", "4+3"), "none")


def test_solve_writes_what_scoring_finds_right(half_trained):
    trained = load(half_trained)
    pairs = [(str(a), str(b)) for a in range(10) for b in range(10)]
    answers = solve(trained, pairs)
    outcome = Scorer(trained, Settings((1,), 100, 0))(ADDITION.arrays(pairs))
    right = [
        answer.text == str(int(a) + int(b)) for (a, b), answer in zip(pairs, answers, strict=True)
    ]
    assert right == outcome.correct.tolist() and any(right)
    for answer in answers:
        assert len(answer.settled) == len(answer.text)
        assert all(1 <= loops <= 3 for loops in answer.settled)


@pytest.mark.parametrize(
    "name", with_slow(["frontier", "frontier-tiny", "pointer"], "frontier-tiny")
)
def test_released_weights_add_a_hundred_digits(name):
    trained = load(ROOT / "released" / name)
    draw = random.Random(0).randrange
    pairs = [(10**100 - 1, 1), *((draw(10**100), draw(10**99)) for _ in range(3))]
    answers = solve(trained, [(str(a), str(b)) for a, b in pairs])
    assert [answer.text for answer in answers] == [str(a + b) for a, b in pairs]
