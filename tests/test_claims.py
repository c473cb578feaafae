"""Sentences of the README whose numbers are worked out from committed results, worked out again.

Facts of specifications are held by `spak_jax.check`; this is what their language cannot say.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import t as student_t

from spak_jax.config import leaves, read_config
from spak_jax.evaluation.forward import forward
from spak_jax.evaluation.loaded import load
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

README = " ".join((ROOT / "README.md").read_text().split())
FIGURES = ROOT / "figures"


def accuracies(pattern: str, part: str, key: str) -> np.ndarray:
    """Percent, of each file by rising seed."""
    files = sorted(FIGURES.glob(pattern))
    assert len(files) in (3, 5)
    return np.array([100 * json.loads(f.read_text())[part][key]["accuracy"] for f in files])


def welch(ours: np.ndarray, others: np.ndarray) -> str:
    """A difference of means with Welch's 95% interval, bounds rounded outwards, as prose has it."""
    parts = [x.var(ddof=1) / len(x) for x in (ours, others)]
    freedom = sum(parts) ** 2 / sum(v**2 / (len(ours) - 1) for v in parts)
    reach = student_t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    mean = ours.mean() - others.mean()
    low, high = math.floor(10 * (mean - reach)) / 10, math.ceil(10 * (mean + reach)) / 10
    return f"{mean:.1f} points ({low:.1f} to {high:.1f}"


@pytest.mark.parametrize("name", ["loop12", "loop128e"])
def test_differences_to_twelve_blocks(name):
    column = "seed_columns", "5-6"
    ours = accuracies(f"reproduced-256/results/{name}-seed?.json", *column)
    gpt = accuracies("reproduced-256/results/gpt12-seed?.json", *column)
    assert welch(ours, gpt) in README


def test_what_coupled_embeddings_reach_at_ten_digits():
    ours = "ablation/results/coupled-embedding-loop2-seed?.json"
    at8, at10 = (accuracies(ours, "lengths", n).mean() for n in ("8", "10"))
    assert f"as embeddings, with two loops, {at8:.0f}% at 8 and {at10:.0f}% at 10" in README


def test_what_is_right_at_seven_digits_at_a_width_of_768():
    def right(name: str, length: int) -> int:
        file = FIGURES / "reproduced-768" / "results" / f"{name}.json"
        return json.loads(file.read_text())["lengths"][str(length)]["correct"]

    loops = [right(f"loop12-w768-seed0{more}", 7) for more in ("", "-loops6", "-loops48")]
    loops += [right(f"loop12-w768-seed0-loops{loops}", 7) for loops in (18, 24)]
    said = f"GPT-12L has none right and LoopLM-12 {loops[0]} ({min(loops)} to {max(loops)} at"
    assert said in README and right("gpt12-w768-seed0", 7) == 0
    assert all(right(name, 8) == 0 for name in ("loop12-w768-seed0", "gpt12-w768-seed0"))


def test_what_halting_saves_and_loses():
    found = json.loads((FIGURES / "halting" / "halting.json").read_text())
    loops = {n: found["lengths"][n]["still"]["row_loops"] for n in ("3", "12")}
    own = found["config"]["model"]["loops"]
    assert f"{found['loops'] / loops['12']:.2f} times fewer block applications" in README
    assert (
        f"its own {own} loops a row saves {own / loops['12']:.2f} times at 12 digits, and"
        f" {own / loops['3']:.2f} at 3" in README
    )
    sure = min(found["calibration"]["sure"], key=lambda tried: tried["doubt"])
    assert sure["accuracy"] == max(x["accuracy"] for x in found["calibration"]["sure"])
    lost = 100 * (found["calibration"]["none"]["accuracy"] - sure["accuracy"])
    assert f"loses {lost:.1f} points on the very problems it is calibrated on" in README


def test_how_much_faster_than_the_peer():
    for name, said in (
        ("gpt12", r"reached by `gpt12` \((\S+)x"),
        ("gpt12-seeds5", r"`loop128e` \((\S+)x, "),
        ("loop128e-seeds5", r"`loop128e` \(\S+x, (\S+)x\)"),
        ("loop12-seeds5", r"five seeds of `loop12` \((\S+)x\) among"),
    ):
        found = json.loads((FIGURES / "results" / f"bench_{name}_h200.json").read_text())
        times = found["milliseconds_a_seed"]["torch"] / found["milliseconds_a_seed"]["pallas"]
        assert re.search(said, README).group(1) == f"{times:.2f}"
        assert (times >= 2) == (name != "loop12-seeds5")


def test_what_differs_between_the_table_and_the_models_with_ids():
    """The README names what does; the lengths do not."""
    table = dict(leaves(read_config(ROOT / "configs" / "loop12.toml").model_dump()))
    for name in ("quickstart", "frontier-tiny", "frontier", "pointer"):
        own = dict(leaves(read_config(ROOT / "configs" / f"{name}.toml").model_dump()))
        differing = {key for key in own if own[key] != table[key]}
        assert {"data.layout", "data.row_length", "data.examples", "model.dropout"} < differing
        assert {"model.dtype", "train.learning_rate", "train.steps"} < differing
        lengths = {"data.max_length", "data.bridge_fraction", "data.bridge_lengths"}
        assert not lengths & differing


@pytest.mark.parametrize("name", ["pointer", "frontier", "frontier-tiny"])
def test_where_the_first_number_starts_is_given(name):
    trained = load(ROOT / "released" / name)
    run = jax.jit(forward(trained.config))
    random = np.random.default_rng(0)

    def problem() -> tuple[str, str]:
        one, other = (int(n) for n in random.integers(100, 1000, 2))
        return f"{one}"[::-1] + "+" + f"{other}"[::-1] + "=", f"{one + other}"[::-1] + "\n"

    def right(before) -> float:
        """Share of whole answers, by teacher forcing."""
        rows = [(before(), *problem()) for _ in range(200)]
        tokens = np.zeros((len(rows), 32), np.int32)
        for row, parts in zip(tokens, rows, strict=True):
            text = "".join(parts)
            row[: len(text)] = [ADDITION.vocabulary.index(symbol) for symbol in text]
        best = np.asarray(run(trained.weights, jnp.asarray(tokens))[0].argmax(-1))
        spans = [(len(p + q) - 1, len(p + q + a) - 1) for p, q, a in rows]
        return np.mean(
            [(best[i, b:e] == tokens[i, b + 1 : e + 1]).all() for i, (b, e) in enumerate(spans)]
        )

    assert right(lambda: "") == 1
    assert right(lambda: "\n") == 0
    assert right(lambda: "".join(problem())) == 0


def test_gates_start_the_counter_anew_at_first_and_are_decided_at_a_half():
    from flax import nnx

    from spak_jax.positions.learned import LearnedCounter

    counter = LearnedCounter(len(ADDITION.vocabulary))
    assert f"({float(counter.soft_gates()[0]):.2f}, where 1 moves it on" in README
    assert not counter.hard_gates().any()
    # One above a half and one below, though both are below the mean of all.
    logits = jnp.full(len(ADDITION.vocabulary), 0.5).at[:2].set(jnp.array([0.1, -0.1]))
    counter.gate_logits = nnx.Param(logits)
    soft = np.asarray(counter.soft_gates())
    assert soft[0] > 0.5 > soft[1] and (soft[:2] < soft.mean()).all()
    assert np.array_equal(counter.hard_gates(), soft > 0.5)
