"""The public API as its types have it: a type checker reads this, and nothing runs it."""

import numpy as np

import spak_jax as spak
from spak_jax.evaluation.results import Results


def use() -> None:
    run: spak.Run = spak.load("released/pointer")
    one: str = run.solve("123+456")
    several: list[str] = run.solve(["1+2", "3+4"], loops=3)
    scores: Results = run.evaluate(lengths=[8, 100], examples=1000)
    accuracy: float = scores.lengths["8"].accuracy
    attention: np.ndarray = run.trace("999+1").attention
    config: spak.Config = spak.Config.from_file("loop12", "train.steps=2000")
    mine: spak.Run = spak.train(config, "runs/mine", on_step=print)
    print(one, several, accuracy, attention, mine)


class Copying(spak.Task):
    symbols = "ab"
    inputs = 1
