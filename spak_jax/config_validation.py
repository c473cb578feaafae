"""Nested values held against their sections, and what is wrong with them in a file's words."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from spak_jax.command_line import InputError, first_line
from spak_jax.config_sections import MODEL_KINDS, RunSections, Section
from spak_jax.former_names import with_present_names

Whole = TypeVar("Whole", bound=RunSections)


def validated(kind: type[Whole], values: Mapping[str, Any], source: str) -> Whole:
    """The section of a kind that nested plain values describe, where they come from `source`.

    Raises:
      InputError: naming the first key or value that is not allowed, and what is.
    """
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


def _allowed_keys(kind: type[Section], location: Sequence[Any]) -> list[str]:
    section: Any = kind
    for part in location:
        if isinstance(part, int):
            # In an array of tables: `tuple[Invariant, ...]`.
            section = get_args(section)[0]
        else:
            section = MODEL_KINDS.get(part) or section.model_fields[part].annotation
    return list(section.model_fields)
