"""Results files: what they hold, written and read by one schema."""

import datetime
import json
import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from spak_jax.command_line import InputError, first_line, write_file
from spak_jax.evaluation.loops import Loops
from spak_jax.former_names import with_present_names

EXPECTED = "a results file as `python -m spak_jax.evaluate RUN --json FILE` writes it"

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[Count, Field(ge=1)]
# Of floating-point operations; a large training has more than a `Count` may be.
Operations = Annotated[int, Field(ge=0)]
Loss = Annotated[float, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
# Six digits at most, and none of them a leading zero: one length has one spelling.
Length = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}$")]


class Part(BaseModel):
    """Checked strictly and never changed; keys it does not name are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Score(Part):
    """Accuracy on some problems, a fraction, with its 95% interval."""

    correct: Count
    total: Positive
    accuracy: Fraction
    low: Fraction
    high: Fraction
    # Loops at the tokens that answer, the mean; 0 of a model that does not loop. `mean_steps` in
    # older files.
    mean_loops: Annotated[float, Field(ge=0)] | None = Field(
        None, validation_alias=AliasChoices("mean_loops", "mean_steps")
    )

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if not math.isclose(self.accuracy, self.correct / self.total, abs_tol=1e-6):
            raise ValueError(
                f"accuracy = {self.accuracy:g} must be correct / total = {self.correct} /"
                f" {self.total}"
            )
        if not self.low - 1e-6 <= self.accuracy <= self.high + 1e-6:
            raise ValueError(
                f"low = {self.low:g}, high = {self.high:g} must enclose accuracy ="
                f" {self.accuracy:g}"
            )
        return self


class LengthScore(Score):
    """A score of problems of some lengths."""

    # Whether they are longer than anything in training.
    zero_shot: bool
    # Floating-point operations of one such problem (`models.flops`), with the loops of
    # `mean_loops`; older files do not say, and problems of several lengths have no one number.
    operations: Operations | None = None
    # Of a published column: the share of its problems that training's lengths hold.
    trained_share: Fraction | None = None


class ConfiguredModel(Part):
    # The whole section tells one system from another, so unknown keys are kept.
    model_config = ConfigDict(extra="allow")
    # Files of all times name it.
    kind: Name | None = None
    layers: Positive | None = None
    loops: Positive | None = None
    # Files from before there was a choice do not name it.
    block: Name = "transformer"
    positions: Name = "rope"
    window: bool = False


class ConfiguredTraining(Part):
    model_config = ConfigDict(extra="allow")
    seed: Count
    steps: Positive | None = None


class StoredConfig(Part):
    """The configuration of the run: what is read here, and all else, to compare runs by."""

    model_config = ConfigDict(extra="allow")
    name: Name
    model: ConfiguredModel
    train: ConfiguredTraining


class Curve(Part):
    """Losses over training steps; all lists empty where the run kept no metrics."""

    step: tuple[Count, ...] = ()
    loss: tuple[Loss, ...] = ()
    validation_step: tuple[Count, ...] = ()
    validation_loss: tuple[Loss, ...] = ()
    # The median over compiled calls.
    seconds_per_step: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _as_many_losses_as_steps(self) -> Self:
        for steps, losses in (("step", "loss"), ("validation_step", "validation_loss")):
            counts = len(getattr(self, steps)), len(getattr(self, losses))
            if counts[0] != counts[1]:
                raise ValueError(f"{counts[0]} values in {steps}, {counts[1]} in {losses}")
        return self


class Results(Part):
    """The contents of a results file: the scores of one run, and what made them."""

    system: Name
    config: StoredConfig
    parameters: Positive
    # Of the training.
    step: Count
    # Floating-point operations of the training up to this step (`models.flops`); older files do not
    # say.
    training_operations: Operations | None = None
    dtype: str = ""
    device: Name
    jax: Name | None = None
    date: datetime.date
    commit: Name | None = None
    # None of a model that does not loop. With some for each symbol of a problem's length, those
    # that are taken beside them.
    loops: Count | None
    loops_per_symbol: Annotated[float, Field(gt=0)] | None = None
    # Thresholds before the answer and from it on, and the rule they are of; None for no halting.
    halting: tuple[Fraction, ...] | None = None
    halting_rule: Name | None = None
    method: str = ""
    # Problems a length, at most, and the seed they are drawn from.
    examples: Positive
    seed: Count
    # Where a person's own problems come from; None of drawn ones.
    problems: Name | None = None
    # What lengths count.
    length_unit: Name = "digits"
    lengths: Annotated[dict[Length, LengthScore], Field(min_length=1)]
    # By the columns of a published table, by their names there.
    published_columns: dict[Name, LengthScore]
    # The task's hard problems, by kind and length.
    kinds: dict[Name, dict[Length, LengthScore]] = {}
    # By what else the task measures, such as carries, and its value.
    measures: dict[Name, dict[Name, Score]] = {}
    training: Curve = Curve()

    @classmethod
    def of(cls, values: Any) -> Self:
        """Results of plain nested values, as JSON has them.

        Raises:
          pydantic.ValidationError: they are no results.
          ValueError: the configuration has a key by two names.
        """
        # JSON, whose lists pydantic takes for tuples where its strict mode takes no others.
        return cls.model_validate_json(json.dumps(_with_present_names(values)))

    @property
    def loops_label(self) -> str:
        """`24`, or in multiples of a problem's length `2x+8`; empty for a model without loops."""
        if self.loops is None:
            return ""
        return str(Loops(self.loops, self.loops_per_symbol or 0.0))

    @property
    def on_the_way(self) -> bool:
        """Whether the training was not at its end yet."""
        steps = self.config.train.steps
        return steps is not None and self.step < steps

    @model_validator(mode="after")
    def _loops_fit_the_model(self) -> Self:
        if (self.loops is None) != (self.config.model.loops is None):
            raise ValueError(
                f"loops = {self.loops} and config.model.loops = {self.config.model.loops}: both"
                " or neither must be a number"
            )
        if self.loops == 0 and self.loops_per_symbol is None:
            raise ValueError("loops = 0: a looped model takes at least one")
        return self


def read_results(path: Path) -> Results:
    """A results file, checked.

    Raises:
      InputError: it cannot be read, is not JSON, or a key is missing or holds what it must not.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the results file {path}: {error.strerror}") from None
    if not content.strip():
        raise InputError(f"{path} is empty: expected {EXPECTED}")
    try:
        return Results.of(json.loads(content))
    except ValidationError as error:
        first, *others = (_explain(problem) for problem in error.errors())
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{path}: {first}{more}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}): expected {EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def _with_present_names(values: Any) -> Any:
    """The same with the names that keys have now: files of the first versions have others."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    if "config" in values:
        values["config"] = with_present_names(values["config"])
    if "seed_columns" in values:
        values.setdefault("published_columns", values.pop("seed_columns"))
    if "carries" in values:
        values.setdefault("measures", {"carries": values.pop("carries")})
    return values


def write_results(path: Path, results: Results) -> None:
    """Writes a results file.

    Raises:
      InputError: it cannot be written.
    """
    write_file(path, results.model_dump_json(indent=1, exclude_unset=True) + "\n")


def _explain(problem: Any) -> str:
    """One of pydantic's findings in one line, the key first."""
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    match problem["type"]:
        case "json_invalid":
            return f"not JSON ({problem['ctx']['error']}): expected {EXPECTED}"
        case "missing":
            return f"{key} is missing: expected {EXPECTED}"
        case "value_error":
            return f"{key or 'results'}: {problem['ctx']['error']}"
    if not key:
        return f"expected an object with keys such as system and lengths: {EXPECTED}"
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key} = {shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
