"""Files of specifications: found by their names, and what they say with their bases and overrides.

A file with `base = ["NAME", ...]` starts from the specifications of these names, beside it or among
those that ship; each may have its own. Of what several say the last word counts, which is the
file's: sections key by key, invariants by name. Facts are claims about one system's results, and
stay with it; so does the name, which names the run folder.
"""

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.programs import InputError, first_line

# Where names of specifications are looked for first, from where a program is started.
CONFIGS = Path("configs")
# What a word of a command line may be, for helps.
NAMED = f"a TOML file, or the name of one in {CONFIGS} or among those that ship"
# Bytes; Python takes seconds for as many nested keys.
LARGEST_SPECIFICATION = 2**15
# What a specification may start from: names, so many, and they from others so often.
BASE_NAME = r"(base/)?[A-Za-z0-9][A-Za-z0-9._-]*"
MOST_BASES, DEEPEST_BASE = 4, 4


def values_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a specification's file says, its bases included, changed by overrides: nested plain
    values.

    Raises:
      InputError: it or a base cannot be read, or is no base; or an override is none.
    """
    try:
        values = _with_bases(path, ())
    except RecursionError:
        raise InputError(f"{path}: keys are nested too deeply") from None
    for override in overrides:
        try:
            _merge(values, _parse_override(override), override)
        except RecursionError:
            raise InputError(f"override {override[:80]!r}: keys are nested too deeply") from None
    return values


def specification_file(word: str | Path) -> Path:
    """The file that a word names: a path, or a name in `configs` here or among those that ship.

    Raises:
      InputError: there is none.
    """
    return named_file(word, CONFIGS, shipped_configs())


def named_file(word: str | Path, *folders: Path, suffix: str = ".toml") -> Path:
    """The file that a word of a command line names: a path, or the name of a file in a folder.

    A path that exists wins.

    Args:
      word: `loop12`, `loop12.toml` or a path.
      folders: where names are looked for, one after the other.
      suffix: of the files there.

    Raises:
      InputError: there is none; the message says what there is.
    """
    word = str(word)
    # Neither fails where a name is too long.
    if os.path.exists(word) and not os.path.isdir(word):
        return Path(word)
    name = word.removesuffix(suffix)
    files = [folder / f"{name}{suffix}" for folder in folders] if os.sep not in name else []
    for file in files:
        if os.path.isfile(file):
            return file
    folder, known = folders[0], []
    for place in folders:
        with contextlib.suppress(OSError):
            known = sorted(path.stem for path in place.glob(f"*{suffix}"))
        if known:
            folder = place
            break
    shown = word if len(word) <= 100 else f"{word[:97]}..."
    close = difflib.get_close_matches(Path(name).name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    there = f"{folder} has {', '.join(known)}" if known else f"the folder {folder} has none here"
    reason = "it is a folder" if os.path.isdir(word) else "no such file"
    raise InputError(f"cannot read the specification {shown}: {reason}; {hint}{there}")


def referred_file(name: str, folder: Path, by: str) -> Path:
    """The specification that another one speaks of: beside it, or among those that ship.

    Args:
      name: a plain name, or `base/NAME`.
      folder: of the specification that speaks of it.
      by: the file and key that do, for the message.

    Raises:
      InputError: it is no such name, or there is no such file.
    """
    if not re.fullmatch(BASE_NAME, name):
        raise InputError(f"{by} = {name[:80]!r}: must be a name such as loop12")
    files = dict.fromkeys(place / f"{name}.toml" for place in (folder, shipped_configs()))
    for file in files:
        if file.is_file():
            return file
    raise InputError(f"{by} = {name!r}: there is no {' nor '.join(map(str, files))}")


def shipped_configs() -> Path:
    """The folder of the configurations that ship: in a wheel within
    `spak_jax`, else beside it."""
    root = Path(__file__).parents[1]
    within = root / "spak_jax" / "configs"
    return within if within.is_dir() else root / "configs"


def _with_bases(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    """What a file and its bases say together. within: the files that this one is a base of."""
    whole = path.resolve()
    if whole in within:
        chain = " -> ".join(file.name for file in (*within, path))
        raise InputError(f"{path} is a base of itself: {chain}")
    if len(within) > DEEPEST_BASE:
        raise InputError(f"{path}: bases are nested more than {DEEPEST_BASE} deep")
    own = _read_values(path)
    bases = own.pop("base", [])
    named = isinstance(bases, list) and all(isinstance(name, str) for name in bases)
    if not named or len(bases) > MOST_BASES:
        raise InputError(f"{path}: base must be a list of at most {MOST_BASES} names of files")
    values: dict[str, Any] = {}
    for name in bases:
        file = referred_file(name, path.parent, f"{path}: base")
        base = _with_bases(file, (*within, whole))
        for own_alone in ("name", "fact"):
            base.pop(own_alone, None)
        _inherit(values, base)
    _inherit(values, own)
    return values


def _inherit(values: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Changes `values` by what a later file says."""
    for key, value in own.items():
        inherited = values.get(key)
        if isinstance(value, Mapping) and isinstance(inherited, dict):
            _inherit(inherited, value)
        elif key == "invariant" and inherited and isinstance(value, list):
            name = lambda each: each.get("name") if isinstance(each, Mapping) else None  # noqa: E731
            again = {name(each) for each in value}
            values[key] = [each for each in inherited if name(each) not in again] + value
        else:
            values[key] = value


def _read_values(path: Path) -> dict[str, Any]:
    """What a TOML file says."""
    try:
        content = path.read_bytes()
        if len(content) > LARGEST_SPECIFICATION:
            raise InputError(
                f"the specification {path} has {len(content):,} bytes: must be at most"
                f" {LARGEST_SPECIFICATION:,}"
            )
        return tomllib.loads(content.decode())
    except OSError as error:
        raise InputError(f"cannot read the specification {path}: {error.strerror}") from None
    # Also integers of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {first_line(error)}") from None


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
