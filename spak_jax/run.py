"""A trained model as people use it from Python: load it, ask it, look into it, score it."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from flax import nnx

from spak_jax import models
from spak_jax.config import Config
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.evaluation import loaded, score
from spak_jax.evaluation.answers import write_answers
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.loops import Loops
from spak_jax.evaluation.results import Results
from spak_jax.evaluation.trace import Trace, trace
from spak_jax.tasks import Task
from spak_jax.training import loop
from spak_jax.training.loggers import Line


class Run:
    """A model as a training left it.

    config: what built it. weights: an `nnx.State`. step: of the training. path: its run folder.
    """

    def __init__(self, model: LoadedModel, path: Path):
        self._loaded = model
        self.config: Config = model.config
        self.weights: Any = model.weights
        self.step: int = model.step
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step {self.step:,}: {self.config.system})"

    @property
    def task(self) -> Task:
        """What it learned."""
        return self._loaded.task

    @functools.cached_property
    def model(self) -> Any:
        """The network: a call takes int tokens `[batch, length]` and gives next-token logits,
        float32 `[batch, length, vocabulary]`.

        Keywords: `loops`, of a looped model, None for as many as in training; `ids`, for a position
        scheme that is given them (`task.position_ids(tokens)`).
        """
        definition, _ = models.abstract(self.config)
        return nnx.merge(definition, self.weights)

    @overload
    def solve(self, problem: str, *, loops: int | str | None = None) -> str: ...
    @overload
    def solve(
        self, problem: list[str] | tuple[str, ...], *, loops: int | str | None = None
    ) -> list[str]: ...
    def solve(
        self, problem: str | list[str] | tuple[str, ...], *, loops: int | str | None = None
    ) -> str | list[str]:
        """The answer that the model writes to a problem such as "123+456", or to each of several.

        Args:
          problem: as people write it; one, or several.
          loops: of a looped model; None for as many as in training. Where it answers in one pass,
            "2x" is twice the length of each problem, "2x+8" eight more.

        Raises:
          ValueError: a problem is none of the task's, or `loops` is out of bounds.
        """
        texts = [problem] if isinstance(problem, str) else problem
        asked = [self.task.parse(text, MAX_LENGTH) for text in texts]
        answers = [answer.text for answer in write_answers(self._loaded, asked, _loops(loops))]
        return answers[0] if isinstance(problem, str) else answers

    def trace(self, problem: str, *, loops: int | None = None) -> Trace:
        """Logits, attention and confidence of every loop, for a problem and its true answer.

        Args:
          problem: as people write it.
          loops: None for as many as in training.

        Raises:
          ValueError: the problem is none of the task's or too long, `loops` is out of bounds, or
            the model does not loop.
        """
        _loops(loops)
        return trace(self._loaded, self.task.parse(problem, MAX_LENGTH), loops)

    def evaluate(
        self,
        lengths: Sequence[int] | None = None,
        *,
        examples: int | None = None,
        seed: int | None = None,
        loops: int | str | None = None,
        decode: bool = False,
        kinds: Sequence[str] = (),
    ) -> Results:
        """Scores on problems drawn anew, whole answers only.

        Args:
          lengths: of the problems; None for those of the configuration.
          examples: problems a length; None for as many as the configuration says.
          seed: of the problems; None for that of the configuration.
          loops: of a looped model; None for as many as in training. "2x" is twice the length of
            each problem, "2x+8" eight more.
          decode: whether answers are generated instead of scored by one pass over the true text.
          kinds: of the task's hard problems (`task.kinds`), scored at each length too.

        Returns:
          What a results file holds.

        Raises:
          ValueError: an argument is out of bounds, or the model does not loop.
        """
        asked = self.config.evaluation
        lengths = asked.lengths if lengths is None else tuple(lengths)
        if not lengths or not all(1 <= length <= MAX_LENGTH for length in lengths):
            raise ValueError(f"lengths = {list(lengths)}: at least one, from 1 to {MAX_LENGTH:,}")
        examples = asked.examples if examples is None else examples
        if examples < 1:
            raise ValueError(f"examples = {examples}: must be at least 1")
        for kind in kinds:
            if kind not in self.task.kinds:
                known = ", ".join(self.task.kinds) or f"{self.task.name} has none"
                raise ValueError(f"kinds = {list(kinds)}: {kind!r} must be of {known}")
        seed = asked.seed if seed is None else seed
        settings = score.Settings(
            lengths, examples, seed, _loops(loops), decode=decode, kinds=tuple(kinds)
        )
        return score.score(self._loaded, settings, self.path)


def load(path: str | Path) -> Run:
    """The newest checkpoint of a run folder.

    Raises:
      InputError: the folder holds none that can be used.
    """
    return Run(loaded.load(Path(path)), Path(path))


def train(
    config: Config, path: str | Path, *, on_step: Callable[[Line], None] | None = None
) -> Run:
    """Trains to the configuration's last step, from the newest checkpoint in the folder if any.

    An interrupt (Ctrl-C) is an exception; the newest checkpoint stays, and the same call goes on
    from there.

    Args:
      config: of one seed (`train.seeds = 1`).
      path: the run folder, made if absent.
      on_step: gets the metrics every so many steps.

    Raises:
      ValueError: `config` has several seeds.
      InputError: the folder is another training's, in use, or cannot be written.
      Failure: the training diverged, or memory or disk is full.
    """
    if config.train.seeds > 1:
        raise ValueError(
            f"config.train.seeds = {config.train.seeds}: one at a time from Python; several train"
            " in one program by python -m spak_jax.train"
        )
    [state] = loop.train(config, Path(path), on_step=on_step)
    return Run(LoadedModel(config, state.weights, int(state.step)), Path(path))


def _loops(loops: int | str | None) -> int | Loops | None:
    """What an argument says; raises ValueError where it is out of bounds."""
    if loops is None:
        return None
    try:
        return Loops.parse(str(loops))
    except ValueError as error:
        raise ValueError(f"loops = {error}") from None
