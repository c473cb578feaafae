"""Specifications and the configurations they hold: read from TOML, overridden, checked.

A specification says what a system is for and which invariants it keeps, and builds a run: prose
where a person decides, formal where a machine can verify. The part that builds the run is its
configuration, a frozen value that every checkpoint carries whole. Both know nothing of arrays;
`tasks`, `models` and `training` build what a configuration describes, `check` holds a specification
to its invariants.
"""

import argparse
import contextlib
import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spak_jax.command_line import InputError, first_line
from spak_jax.config_files import NAMED, specification_file, values_of
from spak_jax.registry import BLOCKS, POSITIONS, TASKS, Registry

# The longest input that training data or a scoring set may ask for, in symbols.
MAX_LENGTH = 10_000

Length = Annotated[int, Field(ge=1, le=MAX_LENGTH)]
# Sizes and steps are int32 where they reach arrays.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Of a mean over steps; with 1 nothing would ever enter it.
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _registered(registry: Registry, key: str, name: str) -> type[Any]:
    """The class that a key names; raises ValueError, with the key, where there is none."""
    try:
        return registry.get(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


class Architecture(Section):
    """What the static and the looped model have in common."""

    width: Positive
    heads: Positive
    mlp: Literal["gelu", "swiglu"] = "gelu"
    # MLP channels; None is 4 widths, or 8/3 of it with "swiglu", which has a third matrix.
    hidden: Positive | None = None
    # The class of its blocks, by name (`spak_jax.models.block`).
    block: str = "transformer"
    # How the model knows where tokens are, by name (`spak_jax.positions`); the "coupled" schemes
    # are given position ids: which digits belong together.
    positions: str = "rope"
    # Of biases: the largest difference of ids that has a bias of its own.
    max_relative_distance: Annotated[int, Field(ge=1, le=64)] = 1
    # Whether keys whose ids differ by more than `max_relative_distance` are masked.
    window: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # The type of activations and products; weights and the residual stream stay float32.
    # "auto" is bfloat16 on a GPU and float32 elsewhere.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _parts_are_registered(self) -> Self:
        _registered(BLOCKS, "model.block", self.block)
        _registered(POSITIONS, "model.positions", self.positions)
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        scheme = POSITIONS.get(self.positions)
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} must divide model.width = {self.width}")
        if scheme.rotates and self.width // self.heads % 2:
            raise ValueError(
                f"model.heads = {self.heads} gives heads of {self.width // self.heads}"
                " channels; RoPE turns pairs of channels, so their number must be even"
            )
        if self.window and not scheme.has_ids:
            others = [name for name in POSITIONS.names() if POSITIONS.get(name).has_ids]
            raise ValueError(
                f"model.window = true needs ids to go by: model.positions = {self.positions!r} has"
                f" none, {', '.join(others)} do"
            )
        return self


class StaticModel(Architecture):
    """`layers` blocks, each with weights of its own (GPT-12L)."""

    kind: Literal["gpt"]
    layers: Positive


class LoopedModel(Architecture):
    """One block applied `loops` times (LoopLM)."""

    kind: Literal["loop"]
    loops: Positive
    # Whether each loop starts from the last one's state with the embedded input added again.
    inject_input: bool = False
    # Whether each loop starts from the last one's state under a LayerNorm, so that states stay as
    # large as they were however often the block is applied.
    normalize_state: bool = False
    # Whether all loops share one step embedding.
    shared_step: bool = False
    # Training first runs a random number of loops, up to this, that no gradient passes.
    no_grad_warmup_loops: Annotated[int, Field(ge=0, le=1_000)] = 0

    @model_validator(mode="after")
    def _warmup_loops_are_like_others(self) -> Self:
        if self.no_grad_warmup_loops and not self.shared_step:
            raise ValueError(
                f"model.no_grad_warmup_loops = {self.no_grad_warmup_loops} needs"
                " model.shared_step = true: before a random number of loops no step has an"
                " embedding of its own"
            )
        return self


class Data(Section):
    """The distribution of training problems, and how they are laid out in rows."""

    # The name of a registered task (`spak_jax.tasks`).
    task: str = "addition"
    # Inputs have at most so many symbols.
    max_length: Length = 4
    # With this chance a problem's inputs have at most 5 or 6 symbols instead, chosen evenly.
    bridge_fraction: Fraction = 0.3
    bridge_lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = (5, 6)
    # "packed": problems follow one another in a row; "single": one problem a row, padded.
    layout: Literal["packed", "single"] = "packed"
    row_length: Positive = 64
    # Problems drawn once and reused for the whole training; 0 for fresh ones at every step.
    examples: Annotated[int, Field(ge=0, le=10_000_000)] = 180_000
    seed: Seed = 0

    @property
    def longest(self) -> int:
        """The longest that an input can be in training; longer ones are zero-shot."""
        bridge = self.bridge_lengths if self.bridge_fraction > 0 else ()
        return max((self.max_length, *bridge))

    @model_validator(mode="after")
    def _rows_hold_a_problem(self) -> Self:
        task = _registered(TASKS, "data.task", self.task)()
        # The newline is only predicted.
        needed = task.text_length(self.longest) - 1
        if self.row_length < needed:
            raise ValueError(
                f"data.row_length = {self.row_length} cannot hold a problem of {self.longest}"
                f" {task.unit}: at least {needed} tokens are needed"
            )
        if 0 < self.examples < 9:
            raise ValueError(
                f"data.examples = {self.examples} leaves no validation problem: 0 for an endless"
                " stream, or at least 9"
            )
        return self


class Train(Section):
    """The recipe: AdamW, warm-up, cosine decay; everything counted in optimizer steps."""

    steps: Positive = 15_000
    batch: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_steps: Positive = 15_000
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Seed = 0
    # Trainings in one program, with the seeds `seed`, `seed + 1`, ...; each has a run folder.
    seeds: Annotated[int, Field(ge=1, le=64)] = 1
    # The most steps that one compiled call runs, between two looks at the loss.
    steps_per_call: Positive = 100
    checkpoint_every: Positive = 1_000

    @model_validator(mode="after")
    def _schedule_ends_after_warmup(self) -> Self:
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"train.decay_steps = {self.decay_steps} must exceed train.warmup_steps ="
                f" {self.warmup_steps}: it counts from the first step"
            )
        return self

    @model_validator(mode="after")
    def _every_seed_is_one(self) -> Self:
        if self.seed + self.seeds > 2**31:
            raise ValueError(
                f"train.seeds = {self.seeds} from train.seed = {self.seed} on: the last,"
                f" {self.seed + self.seeds - 1}, must be less than {2**31}"
            )
        return self


class Parallel(Section):
    """The devices that a training is spread over: `data` times `seeds` of them.

    No part of what is computed: no checkpoint or results file holds it, and a run that was begun on
    some devices goes on with others.
    """

    # Devices that the rows of every batch are split over.
    data: Positive = 1
    # Groups of devices that the seeds (`train.seeds`) are split over, with nothing to exchange.
    seeds: Positive = 1
    # Whether each of the `data` devices keeps a share of the weights and of the optimizer's arrays
    # alone, instead of all of them; each step brings the weights together.
    shard_weights: bool = False

    @model_validator(mode="after")
    def _shares_need_devices(self) -> Self:
        if self.shard_weights and self.data == 1:
            raise ValueError("parallel.shard_weights = true needs parallel.data of at least 2")
        return self


class Evaluation(Section):
    """The zero-shot scoring that ends a training."""

    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = tuple(range(1, 13))
    examples: Positive = 1_000
    seed: Seed = 0


# Names files and folders, so it must be a plain file name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
# The name in tables and figures.
SystemName = Annotated[str, Field(min_length=1, max_length=100)]
Prose = Annotated[str, Field(min_length=1, max_length=2_000)]


class RunSections(Section):
    """What builds a run, but for the system's name."""

    name: Name
    model: Annotated[StaticModel | LoopedModel, Field(discriminator="kind")]
    # Made when it is asked for: its task is looked up then.
    data: Annotated[Data, Field(default_factory=Data)]
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    parallel: Annotated[Parallel, Field(exclude=True)] = Parallel()

    @model_validator(mode="after")
    def _devices_share_evenly(self) -> Self:
        for split, whole, count in (
            ("data", "batch", self.train.batch),
            ("seeds", "seeds", self.train.seeds),
        ):
            devices = getattr(self.parallel, split)
            if count % devices:
                raise ValueError(
                    f"parallel.{split} = {devices} must divide train.{whole} = {count}"
                )
        return self


class Config(RunSections):
    """What builds a run, a frozen value: from a file, or from plain values (`parse_config`)."""

    system: SystemName

    @classmethod
    def from_file(cls, name: str | Path, *overrides: str) -> Self:
        """The configuration of a TOML file, changed by overrides.

        Args:
          name: the path of a file, or the name of a configuration that comes with the package, such
            as "loop12".
          overrides: `key.path=value`, such as "train.steps=2000".

        Raises:
          InputError: there is no such file, or a key or value is not allowed.
        """
        return read_config(specification_file(str(name)), overrides)


class System(Section):
    """What the system is, in the architect's words."""

    name: SystemName
    objective: Prose | None = None
    hypothesis: Prose | None = None
    rationale: Prose | None = None
    # The name that the baseline's table has for it.
    baseline_name: SystemName | None = None
    # Specifications beside this one, by name.
    compared_with: tuple[Name, ...] = ()
    # Lengths that it is to answer without having seen them.
    zero_shot: tuple[Length, ...] = ()


class Invariant(Section):
    """Its name, what it says in prose, and the expression that checks it (`specs.language`)."""

    name: Name
    law: Prose
    check: Annotated[str, Field(min_length=1)]


class Fact(Section):
    """Something learned: the claim, and the expression over results files that must still hold.

    evidence: files by the name that the expression has for them, relative to the specification's
    folder; a pattern such as `results/loop12-seed?.json` stands for several seeds. Without
    evidence a claim is marked as not yet reproduced.
    """

    name: Name
    claim: Prose
    evidence: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], str] = {}
    holds: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _evidence_is_judged(self) -> Self:
        if bool(self.evidence) != (self.holds is not None):
            raise ValueError(
                f"fact {self.name}: evidence and holds belong together; a claim that is not yet"
                " reproduced has neither"
            )
        return self


# Tiles that tuning may choose from, by setting: `num_warps = [4, 8]`.
DesignSpace = dict[str, Annotated[tuple[Positive, ...], Field(min_length=1)]]


class Specification(RunSections):
    """A whole TOML file. kernels: design spaces, by kernel and target."""

    system: System
    invariant: tuple[Invariant, ...] = ()
    fact: tuple[Fact, ...] = ()
    kernels: dict[str, dict[str, DesignSpace]] = {}

    @property
    def config(self) -> Config:
        run = {name: getattr(self, name) for name in RunSections.model_fields}
        return Config(**run, system=self.system.name)

    @model_validator(mode="after")
    def _invariants_and_facts_have_names_of_their_own(self) -> Self:
        names = [each.name for each in (*self.invariant, *self.fact)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} names more than one invariant or fact")
        return self


Whole = TypeVar("Whole", bound=RunSections)

# Keys that were called otherwise before, by section: what checkpoints, results files and
# specifications of that time hold is read as what it is called now.
FORMER_NAMES = {
    "model": {"clip": "max_relative_distance", "free_loops": "no_grad_warmup_loops"},
    "data": {"max_digits": "max_length", "bridge_digits": "bridge_lengths"},
    "evaluation": {"digits": "lengths"},
}


def with_present_names(values: Any) -> Any:
    """The nested values of a configuration, with the names that keys have now.

    Raises:
      ValueError: a key is given by both its names.
    """
    if not isinstance(values, Mapping):
        return values
    values = dict(values)
    for section, names in FORMER_NAMES.items():
        if not isinstance(values.get(section), Mapping):
            continue
        values[section] = dict(values[section])
        for former, name in names.items():
            if former not in values[section]:
                continue
            if name in values[section]:
                raise ValueError(
                    f"{section}.{former} is the former name of {section}.{name}: give one of them"
                )
            values[section][name] = values[section].pop(former)
    return values


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the specification in a file; as `read_specification`."""
    return read_specification(path, overrides).config


def read_specification(path: Path, overrides: Sequence[str] = ()) -> Specification:
    """The specification in a TOML file and its bases (`config_files`), changed by overrides
    such as `model.loops=24`.

    Args:
      path: the file.
      overrides: `key.path=value`, the value in TOML; one that is not TOML is a string.

    Raises:
      InputError: the file cannot be read, or a key or value is not allowed.
    """
    values = values_of(path)
    for override in overrides:
        try:
            _merge(values, _parse_override(override), override)
        except RecursionError:
            raise InputError(f"override {override[:80]!r}: keys are nested too deeply") from None
    return _validated(Specification, values, str(path))


def add_words(
    parser: argparse.ArgumentParser, default: str | None = None, several: bool = False
) -> None:
    """Adds to a command line what `file_and_overrides` or `files_and_overrides` reads.

    Args:
      parser: of the command line.
      default: the name of the configuration that stands for none; None where one must be named.
      several: whether more than one may be named.
    """
    # Not by argparse's own %(default)s: `parse_intermixed_args` hides the defaults of words.
    otherwise = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "words",
        nargs="+" if several else "?" if default else None,
        metavar="CONFIG",
        help=NAMED + otherwise,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="changes to it, such as model.loops=24 or name=trial",
    )
    parser.set_defaults(default_config=default)


def files_and_overrides(arguments: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The specifications that a command line names, by path or by name, and the changes to them.

    A word with `=` is a change, unless it is a file.

    Raises:
      InputError: it names none, or one that is not there.
    """
    given = arguments.words or []
    words = [given] if isinstance(given, str) else given
    files, overrides = [], []
    for word in [*words, *arguments.overrides]:
        # A file keeps the name that Python has for it, whatever the locale.
        if "=" in word and not os.path.isfile(word):
            overrides.append(_as_unicode(word))
        else:
            files.append(word)
    if not files and arguments.default_config is None:
        raise InputError(f"a configuration must be named before {' '.join(overrides)}")
    return list(map(specification_file, files or [arguments.default_config])), overrides


def file_and_overrides(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """`files_and_overrides` of a program that takes one specification.

    Raises:
      InputError: also where several are named.
    """
    files, overrides = files_and_overrides(arguments)
    if len(files) > 1:
        raise InputError(f"one configuration is expected: {', '.join(map(str, files))} are given")
    return files[0], overrides


def _as_unicode(word: str) -> str:
    """A word of the command line; without a locale Python leaves its UTF-8 undecoded."""
    with contextlib.suppress(UnicodeError):
        word.encode()
        return word
    with contextlib.suppress(UnicodeError):
        return os.fsencode(word).decode()
    return word


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """The configuration that nested plain values describe, as checkpoints and results store it.

    Args:
      values: as TOML or JSON gives them.
      source: where they come from, for the message.

    Raises:
      InputError: naming the first key or value that is not allowed, and what is.
    """
    return _validated(Config, values, source)


def _validated(kind: type[Whole], values: Mapping[str, Any], source: str) -> Whole:
    try:
        # JSON, whose lists pydantic takes for tuples where its strict mode takes no others.
        return kind.model_validate_json(json.dumps(with_present_names(values), default=str))
    except ValidationError as error:
        first, *others = (_explain(problem, kind) for problem in error.errors())
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{source}: {first}{more}") from None
    except (ValueError, RecursionError) as error:
        # Thousands of digits, or of levels: no JSON.
        raise InputError(f"{source}: {first_line(error)}") from None


def first_difference(stored: Config, asked: Config, but: Sequence[str] = ()) -> str | None:
    """The first field that differs, with both values, or None where the two are equal.

    Args:
      stored: one configuration.
      asked: the other.
      but: fields, and whole sections, that may differ.
    """
    counts = lambda key: not any(f"{key}.".startswith(f"{each}.") for each in but)  # noqa: E731
    pairs = {key: value for key, value in leaves(stored.model_dump()) if counts(key)}
    for key, value in leaves(asked.model_dump()):
        if not counts(key):
            continue
        if key not in pairs or pairs[key] != value:
            return f"{key} is {pairs.get(key, 'absent')!r} there and {value!r} here"
        del pairs[key]
    for key, value in pairs.items():
        return f"{key} is {value!r} there and absent here"
    return None


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections with their dotted keys, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_override(override: str) -> dict[str, Any]:
    """`key.path=value` as nested values; a value that is not TOML is a string."""
    key, equals, text = override.partition("=")
    # What JSON writes is a string of TOML too, but for one character.
    quoted = json.dumps(text.strip(), ensure_ascii=False).replace("\x7f", "\\u007f")
    expected = (
        f"override {override[:80]!r}: expected key.path=value, such as model.loops=24 or name=trial"
    )
    try:
        override.encode()
        try:
            values = tomllib.loads(override)
        except ValueError:
            values = tomllib.loads(f"{key}{equals}{quoted}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{expected} ({first_line(error)})") from None
    if not values:
        raise InputError(expected)
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any], override: str) -> None:
    for key, change in changes.items():
        if isinstance(change, Mapping):
            inner = values.setdefault(key, {})
            if not isinstance(inner, dict):
                raise InputError(f"override {override!r}: {key} is a value, not a section")
            _merge(inner, change, override)
        else:
            values[key] = change


def _explain(problem: Any, kind: type[Section]) -> str:
    """One of pydantic's findings in the words of a configuration file."""
    # A tagged union puts its tag ("gpt", "loop") behind "model"; the file has no such level.
    path = [part for i, part in enumerate(problem["loc"]) if not (i == 1 and part in MODEL_KINDS)]
    key = ".".join(str(part) for part in path)
    match problem["type"]:
        case "extra_forbidden":
            allowed = _allowed_keys(kind, problem["loc"][:-1])
            close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            return f"unknown key {key}: {hint}allowed here: {', '.join(allowed)}"
        case "missing":
            return f"{key} is missing"
        case "union_tag_not_found":
            return f"{key}.kind is missing: one of {', '.join(MODEL_KINDS)}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            return f"{key}.kind = {tag!r}: must be one of {', '.join(MODEL_KINDS)}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "bool_type":
            return f"{key} = {problem['input']!r}: must be true or false"
        case "string_type" if not isinstance(problem["input"], dict | list):
            given = json.dumps(problem["input"])
            return f"{key} = {given}: must be a string; in quotes it is one, '{key}=\"{given}\"'"
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key} = {shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


MODEL_KINDS = {"gpt": StaticModel, "loop": LoopedModel}


def _allowed_keys(kind: type[Section], location: Sequence[Any]) -> list[str]:
    section: Any = kind
    for part in location:
        if isinstance(part, int):
            # In an array of tables: `tuple[Invariant, ...]`.
            section = get_args(section)[0]
        else:
            section = MODEL_KINDS.get(part) or section.model_fields[part].annotation
    return list(section.model_fields)
