"""Design spaces of kernels as a specification declares them, and the laws that bound them.

    [kernels.long_forward.rtx5070]
    block_q = [64, 128]
    block_k = [32, 64]
    num_warps = [4, 8]
    num_stages = [2, 3]

Of the file this reads the kernels, the laws over `kernel` and `target`, and the sizes that give the
kernels their shape; all else is for others to check.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import compile, evidence, laws, long, tiles
from pallas_kernels.laws import Law, LawError
from pallas_kernels.shapes import Shape
from pallas_kernels.specification_files import values_of
from pallas_kernels.targets import TARGETS

Space = Mapping[str, Sequence[int]]
# What the shape comes from, by section.
SIZES = {"model": ("width", "heads"), "data": ("row_length",), "train": ("batch",)}
# What laws over kernels and targets alone speak of.
OURS = ("kernel", "target")


class Declared(NamedTuple):
    """What a specification says of kernels.

    name: of the specification. case: attention in its training. spaces: by kernel and target.
    laws: by name, those of kernels.
    """

    name: str
    case: compile.Case
    spaces: Mapping[str, Mapping[str, Space]]
    laws: Mapping[str, Law]


def read(path: Path) -> Declared:
    """What a specification's file declares.

    Raises:
      InputError: it, or what it starts from, cannot be read.
      LawError: it lacks a size, or its spaces or laws are not as they must be.
    """
    values = values_of(path)
    sizes = {key: _size(values, section, key) for section, keys in SIZES.items() for key in keys}
    model = values["model"]
    # By the second name in files from before.
    distance = model.get("max_relative_distance", model.get("clip", 1))
    case = compile.Case(
        Shape(
            sizes["batch"], sizes["row_length"], sizes["heads"], sizes["width"] // sizes["heads"]
        ),
        "float32" if model.get("dtype") == "float32" else "bfloat16",
        rate=compile.DROPOUT,
        clip=distance if model.get("window") else None,
    )
    spaces = values.get("kernels", {})
    try:
        for kernel, by_target in spaces.items():
            for target, space in by_target.items():
                if target not in TARGETS:
                    raise LawError(f"kernels.{kernel}.{target}: of {', '.join(TARGETS)}")
                tiles_in(kernel, space)
        stated = [(str(each["name"]), str(each["check"])) for each in values.get("invariant", [])]
    except (AttributeError, TypeError, KeyError) as error:
        raise LawError(f"kernels and invariants are not as they must be ({error!r})") from None
    return Declared(str(values.get("name")), case, spaces, _of_kernels(stated))


def tiles_in(kernel: str, space: Space) -> list[dict[str, int]]:
    """All tiles of a design space, by rising size.

    Args:
      kernel: of `tiles.KERNELS`.
      space: choices by setting, such as `{"num_warps": [2, 4]}`.

    Raises:
      LawError: there is no such kernel, its settings are others, or a number is no power of two.
    """
    if kernel not in tiles.KERNELS:
        raise LawError(f"kernels.{kernel}: there are {', '.join(tiles.KERNELS)}")
    settings = ("num_warps",) if kernel in tiles.SHORT_KERNELS else long.Tile._fields
    if set(space) != set(settings):
        raise LawError(
            f"kernels.{kernel} has {', '.join(space)}: its settings are {', '.join(settings)}"
        )
    for name, choices in space.items():
        for choice in choices:
            # Stages of a pipeline may be any number.
            if name != "num_stages" and (choice < 1 or choice & (choice - 1)):
                raise LawError(f"kernels.{kernel}: {name} = {choice} is no power of two")
    choices = itertools.product(*(sorted(space[name]) for name in settings))
    tried = [dict(zip(settings, choice, strict=True)) for choice in choices]
    return sorted(tried, key=lambda tile: tile.get("block_q", 1) * tile.get("block_k", 1))


def tile_to_judge(
    target: str, case: compile.Case, kernel: str, space: Space
) -> dict[str, int] | None:
    """The smallest tile of a design space; None where the one in use lies in the space.

    Raises:
      LawError: as `tiles_in`.
    """
    declared = tiles_in(kernel, space)
    return None if compile.settings_of(target, case, kernel) in declared else declared[0]


def broken_laws(declared: Declared, target: str, reports: Sequence[compile.Report]) -> list[str]:
    """Names of the laws that a kernel with these reports breaks."""

    def lookup(path: laws.Path) -> laws.Value:
        if path[0] == "target":
            return evidence.of_target(target, path)
        return evidence.of_kernels(reports, path)

    return [name for name, law in declared.laws.items() if law.check(lookup).holds is False]


def with_fact(text: str, name: str, claim: str, files: Mapping[str, str], holds: str) -> str:
    """A specification's text with a fact at its end; one of that name gives way to it."""
    block = re.compile(
        rf'\n*\[\[fact\]\]\nname = "{re.escape(name)}"\n(?:(?!\[).*(?:\n|$))*', re.MULTILINE
    )
    evidence_lines = "".join(
        f"evidence.{key} = {json.dumps(file)}\n" for key, file in files.items()
    )
    fact = (
        f'[[fact]]\nname = "{name}"\nclaim = {json.dumps(claim)}\n'
        f"{evidence_lines}holds = {json.dumps(holds)}\n"
    )
    return f"{block.sub(chr(10), text).rstrip()}\n\n{fact}"


def _size(values: Mapping[str, Any], section: str, key: str) -> int:
    found = values.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LawError(
            f"{section}.{key} = {value!r}: tuning needs a size there, a positive integer"
        )
    return value


def _of_kernels(stated: Sequence[tuple[str, str]]) -> dict[str, Law]:
    found = {}
    for name, check in stated:
        try:
            law = laws.parse(check)
        except LawError as error:
            raise LawError(f"the law {name}, {check!r}: {error}") from None
        if all(path[0] in OURS for path in law.quantities()):
            found[name] = law
    return found
