"""Results files: what is refused, what is one system, estimates over seeds."""

import copy
import json
import math

import pytest
from results_files import CURVE, gathered, results, score, written
from scipy.stats import binomtest
from scipy.stats import t as student_t

from spak_jax.command_line import InputError
from spak_jax.evaluation import statistics
from spak_jax.evaluation.results import LengthScore, read_results
from spak_jax.evaluation.statistics import estimate
from spak_jax.reports import grouping
from spak_jax.reports.grouping import (
    Tally,
    loop_families,
    scheme_families,
    training_families,
)


def seeds(*correct, total=1000):
    return [LengthScore.model_validate(score(c, total)) for c in correct]


def students(*correct):
    """Mean and reach of Student's interval, of thousandths."""
    count = len(correct)
    mean = sum(correct) / count / 1000
    deviation = math.sqrt(sum((c / 1000 - mean) ** 2 for c in correct) / (count - 1))
    return mean, student_t.ppf(0.975, count - 1) * deviation / math.sqrt(count)


def wilson(correct, total):
    return tuple(binomtest(correct, total).proportion_ci(method="wilson"))


def test_seeds_that_differ_have_students_interval_of_the_mean():
    correct = (700, 800, 750, 900, 650)
    mean, reach = students(*correct)
    assert estimate(seeds(*correct)) == pytest.approx((mean, mean - reach, mean + reach, 5))


@pytest.mark.parametrize("correct", [0, 3_000, 10_000])
def test_seeds_that_agree_claim_no_more_than_their_problems_allow(correct):
    found = estimate(seeds(*[correct] * 5, total=10_000))
    assert found == pytest.approx((correct / 10_000, *wilson(5 * correct, 50_000), 5))
    assert found.high - found.low > 7e-5


def test_each_bound_is_the_wider_of_students_and_the_pooled_one():
    # Seeds with few problems count as much in the mean, but little in the pooled counts.
    scores = [*seeds(300, 300, 310, 305, total=1000), *seeds(3, total=10)]
    mean = (0.3 + 0.3 + 0.31 + 0.305 + 0.3) / 5
    low, high = wilson(1218, 4010)
    found = estimate(scores)
    assert found == pytest.approx((mean, low, high, 5))
    mean, reach = students(990, 1000, 995)
    low, high = wilson(2985, 3000)
    assert low > mean - reach
    assert estimate(seeds(990, 1000, 995)) == pytest.approx((mean, mean - reach, 1.0, 3))


def test_interval_over_seeds_stays_within_0_and_1():
    assert estimate(seeds(0, 1000)) == (0.5, 0.0, 1.0, 2)


def test_one_seed_keeps_its_own_interval_and_no_score_gives_none():
    [own] = seeds(400)
    assert estimate([own]) == (0.4, own.low, own.high, 1)
    assert estimate([]) is None


def test_runs_that_differ_in_the_training_seed_are_one_system_by_rising_seed():
    [line], repeats = gathered(results(seed=2), results(seed=0), results(seed=1))
    assert [r.config.train.seed for r in line.results] == [0, 1, 2]
    assert line.label == "LoopLM-12 (Dynamic)" and not repeats


def test_same_evaluation_twice_is_kept_once_and_said():
    [line], repeats = gathered(results(), results(date="2026-11-23"))
    assert len(line.results) == 1
    assert repeats == ["1.json is the same evaluation as 0.json: drawn once"]


def test_other_lengths_of_the_same_run_extend_its_line():
    more = results(lengths={"12": score(999), "16": score(5, zero_shot=True)})
    [line], repeats = gathered(results(), more)
    assert line.lengths == [*range(1, 13), 16]
    assert line.at_length(12).mean == 0.04
    assert not repeats


def test_kinds_of_another_file_of_the_same_run_are_added():
    plain = results()
    nines = results(kinds={"nines": {"1": score(1, 2), "2": score(2, 2)}})
    more = results(kinds={"nines": {"2": score(0, 2), "3": score(2, 2)}, "no-carry": {}})
    [line], repeats = gathered(plain, nines, more)
    assert line.kinds == ["nines"] and not repeats
    # Of the second length the first file's score.
    assert line.tally("nines") == Tally(1, 6, [1, 2, 3])


def test_wrong_answers_are_counted_over_all_lengths_and_seeds():
    lengths = {"1": score(1000), "30": score(10, 50)}
    first = results(lengths=lengths, kinds={"all-carry": {"2": score(999)}})
    second = results(seed=1, lengths={"1": score(997), "100": score(1)})
    [line], _ = gathered(first, second)
    assert line.tally() == Tally(3 + 40 + 999, 3050, [1, 30, 100])
    assert line.tally("all-carry") == Tally(1, 1000, [2])
    assert line.tally("no-carry") is None


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"step": 50}, "after 50 of 100 steps"),
        ({"method": "decoding"}, "method decoding"),
        ({"dtype": "bfloat16"}, "dtype bfloat16"),
        ({"halting": [0.9, 0.999]}, "halting"),
    ],
)
def test_evaluations_that_differ_are_distinguished(changes, difference):
    evaluated, _ = gathered(results(), results(**changes))
    labels = [line.label for line in evaluated]
    assert len(set(labels)) == 2 and difference in labels[1]


def test_loop_families_hold_what_differs_in_loops_alone():
    evaluated, _ = gathered(
        results(loops=24),
        results("loop30", "LoopLM-30", 30, 30),
        results(loops=8),
        results("gpt12", "GPT-12L (Static)", None, None),
    )
    [(label, lines)] = loop_families(evaluated)
    assert label == "LoopLM-12 (Dynamic)"
    assert [line.first.loops for line in lines] == [8, 24]


def test_scheme_families_hold_the_same_models_by_scheme_and_window():
    bias, window = {"positions": "coupled-bias"}, {"positions": "coupled-bias", "window": True}
    evaluated, _ = gathered(
        results("a", "A", None, None, model={"layers": 2}),
        results("b", "B", 4, 4, model=bias),
        results("c", "C", 4, 4, model=window),
        results("c", "C", 4, 8, model=window),
        results("d", "D", 1, 1, model={"positions": "rope"}, step=50),
        results("b", "B", 4, 4, seed=1, model=bias),
        results("e", "E", None, None, model=bias | {"layers": 1}, halting=[0.9]),
    )
    families = scheme_families(evaluated)
    assert [(title, [line.label for line in lines]) for title, lines in families] == [
        ("rope", ["GPT, 2 layers", "LoopLM, 1 loop after 50 of 100 steps"]),
        ("coupled-bias", ["LoopLM, 4 loops", "GPT, 1 layer, halting"]),
        ("coupled-bias, window", ["LoopLM, 4 loops", "LoopLM, 4 loops, at 8"]),
    ]
    both_seeds = families[1][1][0]
    assert [r.config.train.seed for r in both_seeds.results] == [0, 1]


def test_models_of_one_scheme_that_are_as_deep_are_distinguished_by_settings_before_names():
    evaluated, _ = gathered(
        results("rope", "With RoPE"),
        *(results(f"n{w}", f"None, {w}", model={"positions": "none", "width": w}) for w in (8, 16)),
        *(results(f"b{i}", f"Bias {i}", model={"positions": "bias"}) for i in (1, 2)),
    )
    labels = [[line.label for line in lines] for _, lines in scheme_families(evaluated)]
    assert labels == [
        ["LoopLM, 12 loops"],
        ["LoopLM, 12 loops, model.width 8", "LoopLM, 12 loops, model.width 16"],
        ["LoopLM, 12 loops, name b1", "LoopLM, 12 loops, name b2"],
    ]


def test_a_window_alone_makes_no_second_scheme():
    evaluated, _ = gathered(
        *(results(model={"positions": "learned", "window": window}) for window in (True, False))
    )
    assert scheme_families(evaluated) == []


def test_training_families_hold_each_run_once_with_its_longest_curve():
    longer = CURVE | {"step": [10, 20, 40]}
    evaluated, _ = gathered(
        results("gpt12", "GPT-12L (Static)", None, None),
        results(training=CURVE),
        results(loops=24, training=longer),
        results(seed=1, training=CURVE),
    )
    [(index, family)] = training_families(evaluated)
    assert index == 1 and family.label == "LoopLM-12 (Dynamic)"
    assert [r.training.step[-1] for r in family.results] == [40, 30]


def test_words_on_where_results_come_from():
    own = results(problems="mine.txt", examples=7, seed=4, date="2026-12-01")
    evaluated, _ = gathered(*(results(seed=s) for s in (2, 0, 1)), own)
    every = [r for line in evaluated for r in line.results]
    expected = "NVIDIA H100 80GB HBM3, 2026-11-22 to 2026-12-01, training seeds 0-2, 4"
    assert grouping.origin(every) == expected
    assert grouping.problem_counts(every) == "1,000 problems a length, 7 problems in mine.txt"
    fewer = [*every, *gathered(results(lengths={"1000": score(50, 100)}))[0][0].results]
    expected = "at most 1,000 problems a length, 7 problems in mine.txt"
    assert grouping.problem_counts(fewer) == expected
    assert grouping.interval_kind(evaluated[1:]) == statistics.WILSON
    assert grouping.interval_kind(evaluated[:1]) == statistics.OVER_SEEDS
    notes = [grouping.seed_note(counts) for counts in ([1, 1], [5], [1, 3])]
    assert notes == ["", ", 5 seeds", ", 1 to 3 seeds"]


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
    "no columns": (without("published_columns"), "published_columns is missing"),
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
    "below 0": (changed("published_columns.5-6.low", -0.1), "published_columns.5-6.low = -0.1"),
    "infinite": (changed("lengths.8.high", math.inf), "lengths.8.high = inf"),
    "boolean": (changed("lengths.8.accuracy", True), "lengths.8.accuracy = True"),
    "other accuracy": (changed("lengths.8.accuracy", 0.35), "lengths.8: accuracy = 0.35"),
    "outside interval": (changed("lengths.8.low", 0.5), "lengths.8: low = 0.5"),
    "no problems": (changed("lengths.8.total", 0), "lengths.8.total = 0"),
    "no loops": (changed("loops", None), "loops = None"),
    "loops 0": (changed("loops", 0), "loops = 0"),
    "NaN loss": (changed("training.loss", [1.0, math.nan, 1.0]), "loss.1 = nan"),
    "kinds as a list": (changed("kinds", ["nines"]), "kinds = ['nines']"),
    "kind as a score": (changed("kinds", {"nines": score(1)}), "kinds.nines.correct"),
    "length 0 of a kind": (changed("kinds", {"nines": {"0": score(1)}}), "kinds.nines.0"),
    "other accuracy of a kind": (
        changed("kinds", {"nines": {"1": score(1, 2) | {"accuracy": 0.6, "high": 0.7}}}),
        "kinds.nines.1: accuracy = 0.6",
    ),
    "no scheme": (changed("config.model.positions", None), "config.model.positions = None"),
    "window 1": (changed("config.model.window", 1), "config.model.window = 1"),
    "lost loss": (changed("training.loss", [1.0]), "training: 3 values in step, 1 in loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results_are_refused_by_file_and_key(case, tmp_path):
    content, expected = BAD[case]
    bad = written(tmp_path, content)
    with pytest.raises(InputError) as refusal:
        read_results(bad)
    message = str(refusal.value)
    assert str(bad) in message and expected in message and "\n" not in message


def test_good_results_are_read_past_keys_that_are_not_known(tmp_path):
    found = read_results(written(tmp_path, results(training=CURVE, another=1)))
    assert found.lengths["8"].accuracy == 0.36 and found.training.loss == (2.5, 1.0, 0.1)


def test_files_of_former_names_are_read_as_they_are_called_now(tmp_path):
    values = results()
    former = values | {
        "seed_columns": values["published_columns"],
        "carries": values["measures"]["carries"],
        "config": values["config"] | {"data": {"max_digits": 4, "bridge_digits": [5], "seed": 0}},
    }
    del former["published_columns"], former["measures"]
    former = json.loads(json.dumps(former).replace("mean_loops", "mean_steps"))
    present = values["config"] | {"data": {"max_length": 4, "bridge_lengths": [5], "seed": 0}}
    found = read_results(written(tmp_path, former))
    assert found.lengths["8"].mean_loops == 4
    assert found == read_results(written(tmp_path, values | {"config": present}))
    both = former | {"config": present | {"data": {"max_length": 4, "max_digits": 4}}}
    with pytest.raises(InputError, match="data.max_digits is the former name of data.max_length"):
        read_results(written(tmp_path, both))


@pytest.mark.parametrize("path", ["absent.json", "."])
def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(InputError, match="cannot read the results file"):
        read_results(tmp_path / path)


def test_halting_rules_are_distinguished_and_older_files_mean_confidence():
    old = results(halting=[0.9, 0.9])
    same = old | {"halting_rule": "confidence", "commit": None}
    other = old | {"halting_rule": "convergence"}
    lines, repeats = gathered(old, same, other)
    assert [line.label for line in lines] == [
        "LoopLM-12 (Dynamic), halting",
        "LoopLM-12 (Dynamic), halting by convergence",
    ]
    assert len(repeats) == 1
