"""Results files: what is refused, what is one system, estimates over seeds."""

import copy
import json
import math

import pytest
from results_files import CURVE, gathered, results, score, written
from scipy.stats import binomtest
from scipy.stats import t as student_t

from spak_jax import results as module
from spak_jax.command_line import InputError
from spak_jax.results import Score, estimate, loop_families, read_results, training_families


def seeds(*correct, total=1000):
    return [Score.model_validate(score(c, total)) for c in correct]


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
    told = "NVIDIA H100 80GB HBM3, 2026-11-22 to 2026-12-01, training seeds 0-2, 4"
    assert module.origin(every) == told
    assert module.problem_counts(every) == "1,000 problems a length, 7 problems in mine.txt"
    assert module.interval_kind(evaluated[1:]) == module.WILSON
    assert module.interval_kind(evaluated[:1]) == module.OVER_SEEDS
    notes = [module.seed_note(counts) for counts in ([1, 1], [5], [1, 3])]
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
def test_bad_results_are_refused_by_file_and_key(case, tmp_path):
    content, told = BAD[case]
    bad = written(tmp_path, content)
    with pytest.raises(InputError) as refusal:
        read_results(bad)
    message = str(refusal.value)
    assert str(bad) in message and told in message and "\n" not in message


def test_good_results_are_read_past_keys_that_are_not_known(tmp_path):
    found = read_results(written(tmp_path, results(training=CURVE, another=1)))
    assert found.lengths["8"].accuracy == 0.36 and found.training.loss == (2.5, 1.0, 0.1)


@pytest.mark.parametrize("path", ["absent.json", "."])
def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(InputError, match="cannot read the results file"):
        read_results(tmp_path / path)
