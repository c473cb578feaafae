"""Specifications and the configurations they hold: read from TOML, overridden, checked.

A specification says what a system is for and which invariants it keeps, and builds a run: prose
where a person decides, formal where a machine can verify. The part that builds the run is its
configuration, a frozen value that every checkpoint carries whole. Both know nothing of arrays;
`tasks`, `models` and `training` build what a configuration describes, `check` holds a specification
to its invariants.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from spak_jax.config_files import specification_file, values_of
from spak_jax.config_sections import (
    Evaluation,
    Length,
    Name,
    Positive,
    RunSections,
    Section,
    Train,
)
from spak_jax.config_validation import validated

# The name in tables and figures.
SystemName = Annotated[str, Field(min_length=1, max_length=100)]
Prose = Annotated[str, Field(min_length=1, max_length=2_000)]


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

    def model_only(self) -> Self:
        """The same model of the same task without a name, its training and scoring the defaults:
        equal for all configurations whose models are computed by the same program."""
        beside = {"name": "any", "system": "any", "train": Train(), "evaluation": Evaluation()}
        return self.model_copy(update=beside)


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
    return validated(Specification, values_of(path, overrides), str(path))


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """The configuration that nested plain values describe, as checkpoints and results store it.

    Args:
      values: as TOML or JSON gives them.
      source: where they come from, for the message.

    Raises:
      InputError: naming the first key or value that is not allowed, and what is.
    """
    return validated(Config, values, source)


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
