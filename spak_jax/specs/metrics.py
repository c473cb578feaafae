"""What the invariants of a specification may speak of (`language`), and how each is found.

| metric | what, and its unit |
| --- | --- |
| `model.KEY`, `data.KEY`, `train.KEY`, `evaluation.KEY` | the configuration's own values |
| `data.lengths` | every length that an input can have in training, by the configuration |
| `data.sampled_lengths` | the lengths met in a million problems drawn for training |
| `system.zero_shot` | the lengths it is to add without having seen them |
| `parameters` | weights, counted without making any |
| `operations.step`, `operations.training` | one seed's floating-point operations (`models.flops`) |
| `format.training`, `format.scoring` | one problem as training and as scoring write it |
| `halting.difference` | of logits, largest, of a plain run and one that may halt, as a share |
| `compared["NAME"].METRIC` | the same of a specification in `system.compared_with` |
| `target.PART` | of the GPU: shared_memory_per_block, memory, l2, multiprocessors, bandwidth |
| `kernel.NAME.PART` | shared_memory, registers or spilled bytes of a kernel, compiled for the GPU |
| `memory.step` | bytes that a training step holds on the GPU, compiled for it |
| `time.step` | seconds that a training step takes there at least: an estimate (`roofline`) |
| `accuracy["LENGTH"].PART`, `column["5-6"].PART` | mean, low, high or seeds, of results files |
| `wrong` | wrong answers in results files, at all lengths together |

Those of configurations, weights and operations are known at once; the others ask for a compiler, a
target or results, and are unknown without them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.kernel_names import current_name
from pallas_kernels.tuning import aot
from pallas_kernels.tuning.cases import DROPOUT, Case
from pallas_kernels.tuning.shapes import StreamShape
from pallas_kernels.tuning.stream_cases import OPERATIONS
from spak_jax import jax_settings, models, tasks
from spak_jax.config import Config, Specification, read_specification
from spak_jax.config_files import referred_file
from spak_jax.config_sections import Data, LoopedModel
from spak_jax.data import sample_training, training_batch
from spak_jax.evaluation.statistics import Estimate
from spak_jax.models import flops
from spak_jax.reports.grouping import Evaluated
from spak_jax.specs import design_space, gpu_metrics, roofline
from spak_jax.specs.gpu_metrics import training_attention
from spak_jax.specs.language import ExpressionError, Impossible, Unknown, Value, spelled
from spak_jax.specs.language import Path as Name

SAMPLED = 1_000_000
# How halting is compared with a plain run: loops at most, and times the first weights.
HALTING_LOOPS, ENLARGED = 4, 10.0
SECTIONS = ("model", "data", "train", "evaluation")
NAMES = (
    *SECTIONS, "system", "parameters", "operations", "format", "halting", "compared", "target",
    "kernel", "memory", "time", "accuracy", "column", "wrong",
)  # fmt: skip
NO_COMPILER = "needs a compiler for that GPU: pip install -e '.[aot]'"


class Metrics:
    """The metrics of one specification, found as invariants ask for them: a `language.Lookup`.

    Args:
      specification: whose.
      folder: where those that it is compared with lie.
      target: the GPU that is compiled for, or None.
      results: its results, or None.
      thorough: whether what takes more than a moment is found, or left unknown.

    What is compiled for a target asks for a process that touches no GPU (`aot.touch_no_gpu`).
    """

    def __init__(
        self,
        specification: Specification,
        folder: Path,
        target: str | None = None,
        results: Evaluated | None = None,
        thorough: bool = True,
    ):
        self._specification, self._config = specification, specification.config
        self._folder, self._target = folder, target
        self._results, self._thorough = results, thorough
        self._reports: dict[str, list[aot.Report]] = {}

    def __call__(self, name: Name) -> Value:
        """Raises as `language.Lookup` says."""
        match name:
            case ("data", "lengths"):
                return tuple(range(1, self._config.data.longest + 1))
            case ("data", "sampled_lengths"):
                self._take_time("a million problems are drawn by `check`")
                return _sampled_lengths(self._config.data)
            case (section, key) if section in SECTIONS:
                return self._configured(name, getattr(self._config, section), key)
            case ("system", "zero_shot"):
                return self._specification.system.zero_shot
            case ("parameters",):
                return models.parameters_of(self._config)
            case ("operations", "step"):
                return flops.operations_a_step(self._config)
            case ("operations", "training"):
                return self._config.train.steps * flops.operations_a_step(self._config)
            case ("format", "training" | "scoring" as where):
                self._take_time("both are written by `check`")
                return _written(self._config)[where]
            case ("halting", "difference"):
                self._take_time("the model is run by `check`")
                model = self._config.model
                if not isinstance(model, LoopedModel):
                    raise ExpressionError(
                        f"halting.difference: {self._config.name} is {model.described}, which never"
                        " halts"
                    )
                return _halting_difference(model, self._config.data)
            case ("compared", other, *rest) if rest:
                return self._compared(other)(tuple(rest))
            case ("target", *_):
                return gpu_metrics.of_target(self._target, name)
            case ("kernel", *_):
                gpu_metrics.require_kernel(name)
                return gpu_metrics.of_kernels(self._kernels(name[1]), name)
            case ("memory", "step"):
                return self._estimate()["bytes_held"]
            case ("time", "step"):
                found = self._estimate()
                by = ("least_milliseconds_by_operations", "least_milliseconds_by_bytes")
                return max(found[key] for key in by) / 1e3
            case ("accuracy" | "column" | "wrong", *_):
                if self._results is None:
                    raise Unknown("no results are given")
                return of_results(self._results, name)
        raise no_metric(name, NAMES)

    def _configured(self, name: Name, section: Any, key: str) -> Value:
        known = [*type(section).model_fields, *(["longest"] if name[0] == "data" else [])]
        if key not in known:
            raise no_metric(name, (f"{name[0]}.{each}" for each in known))
        return getattr(section, key)

    def _take_time(self, what: str) -> None:
        if not self._thorough:
            raise Unknown(what)

    def _compared(self, other: str) -> "Metrics":
        if other not in self._specification.system.compared_with:
            raise ExpressionError(f"compared[{other!r}]: {other} is not in system.compared_with")
        file = referred_file(other, self._folder, "system.compared_with")
        return Metrics(read_specification(file), file.parent, self._target, None, self._thorough)

    def _kernels(self, name: str) -> list[aot.Report]:
        self._require_target()
        if name not in self._reports:
            cases = kernel_cases(self._specification, self._target, name)
            self._reports[name] = aot.measure([self._target], cases)
        return self._reports[name]

    def _estimate(self) -> dict[str, Any]:
        self._require_target()
        return _compiled_step(self._config, self._target)

    def _require_target(self) -> None:
        if self._target is None:
            raise Unknown("no target is given")
        self._take_time("`check` compiles it")
        try:
            aot.check_plugin()
            aot.find_assembler()
        except aot.Unavailable:
            raise Unknown(NO_COMPILER) from None


def of_results(results: Evaluated, name: Name) -> Value:
    """A metric of results files, such as `accuracy["12"].low`.

    Raises:
      ExpressionError: there is no such metric.
      Unknown: they were not scored at that length.
    """
    match name:
        case ("accuracy", length, part) if length.isdecimal() and part in Estimate._fields:
            found = results.at_length(int(length))
        case ("column", column, part) if part in Estimate._fields:
            found = results.in_column(column)
        case ("wrong",):
            return results.tally().wrong
        case ("parameters",):
            return results.first.parameters
        case _:
            parts = ", ".join(Estimate._fields)
            known = (f'{each}["..."] with {parts}' for each in ("accuracy", "column"))
            raise no_metric(name, (*known, "wrong", "parameters"))
    if found is None:
        raise Unknown(f"{spelled(name[:2])} was not scored")
    return getattr(found, name[2])


def no_metric(name: Name, known: Iterable[str]) -> ExpressionError:
    return ExpressionError(f"no metric {spelled(name)}: there are {', '.join(known)}")


def kernel_cases(specification: Specification, target: str, name: str) -> list[Case]:
    """What a kernel's name in an invariant means for a specification: what is compiled for it.

    The tiles are those that the kernels take on the target; where the specification declares a
    design space that they do not lie in, its smallest tile as well. None are where a model has no
    attention.

    Raises:
      ExpressionError: a design space has other settings than its kernel.
    """
    config, name = specification.config, current_name(name)
    if name in OPERATIONS:
        tokens = config.train.batch * config.data.row_length
        shape = StreamShape(tokens, config.model.width)
        return [Case(name, shape, gpu_metrics.training_dtype(config), rate=DROPOUT)]
    case = training_attention(config)
    if case is None:
        return []
    cases, spaces = [case], design_space.spaces_of(specification)
    for kernel in gpu_metrics.KERNELS[name]:
        space = spaces.get(kernel, {}).get(target)
        if space and (settings := design_space.tile_to_judge(target, case, kernel, space)):
            cases.append(dataclasses.replace(case, kernel=kernel, settings=settings))
    return cases


@functools.cache
def _compiled_step(config: Config, target: str) -> Mapping[str, Any]:
    try:
        return roofline.estimate(config, target)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise Impossible(f"a training step does not compile for {target}: {reason}") from None


@functools.cache
def _sampled_lengths(data: Data) -> tuple[int, ...]:
    """Sizes of a million problems drawn for training."""

    @jax.jit
    def lengths():
        problems = sample_training(jax.random.key(data.seed), data, (SAMPLED,))
        return tasks.of(data).lengths(problems)

    return tuple(np.unique(lengths()).tolist())


def _written(config: Config) -> dict[str, str]:
    """One problem as training and as scoring write it, up to its newline."""
    data, task = config.data, tasks.of(config.data)
    size = min(data.longest, 6)
    problems, length = task.sample_exact(jax_settings.key(0), size, 1), task.text_length(size)
    given = tasks.Problems(*map(jnp.asarray, problems))
    trained = training_batch(jax.random.key(0), data, 1, given)
    scored = task.batch(given, length)

    def text(batch: tasks.Batch) -> str:
        """What is read, and with it the last token of what is written."""
        written = batch.targets[0, len(batch.targets[0]) - (not task.one_pass) :]
        return task.decode(np.append(batch.tokens[0], written)).partition("\n")[0]

    return {"training": text(trained), "scoring": text(scored)}


@functools.cache
def _halting_difference(model: LoopedModel, data: Data) -> float:
    """Largest difference between logits of a plain run and one whose thresholds none reaches.

    What one path leaves out it leaves out of any loop, and of any weights: but the first ones are
    so small that little depends on positions yet.
    """
    loops = min(model.loops, HALTING_LOOPS)
    few = {"dtype": "float32", "loops": loops, "supervised_loops": None}
    config = Config(name="halting", system="halting", model=model.model_copy(update=few), data=data)
    task = tasks.of(data)
    problems = task.sample_exact(jax_settings.key(0), data.longest, 4)
    length = task.row_length(data.longest)

    @jax.jit
    def difference(key):
        network = models.build(config, key, "xla")
        definition, weights = nnx.split(network)
        network = nnx.merge(definition, jax.tree.map(lambda x: ENLARGED * x, weights))
        tokens = task.batch(problems, length).tokens
        ids = task.position_ids(tokens)
        plain = network(tokens, position_ids=ids)
        never = jnp.full(tokens.shape, 2.0)
        halting, _ = network.halting_logits(tokens, never, position_ids=ids)
        return jnp.abs(plain - halting).max() / jnp.abs(plain).max()

    return float(difference(jax_settings.key(0)))
