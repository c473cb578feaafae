"""Design spaces of kernels as a specification declares them, and the invariants that bound them.

[kernels.flash_forward.rtx5070]
block_q = [64, 128]
block_k = [32, 64]
num_warps = [4, 8]
num_stages = [2, 3]
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pallas_kernels import tiles
from pallas_kernels.kernel_names import current_name
from pallas_kernels.ops.attention import flash
from pallas_kernels.targets import TARGETS
from pallas_kernels.tuning import attention_case
from pallas_kernels.tuning.aot import Report
from pallas_kernels.tuning.cases import Case
from spak_jax.config import Invariant, Specification
from spak_jax.specs import gpu_metrics, language
from spak_jax.specs.gpu_metrics import training_attention
from spak_jax.specs.language import Expression, ExpressionError

Space = Mapping[str, Sequence[int]]
# What invariants of kernels and targets alone speak of.
OURS = ("kernel", "target")


class Declared(NamedTuple):
    """What a specification says of kernels.

    name: of the specification. case: attention in its training. spaces: by kernel and target.
    invariants: by name, those of kernels.
    """

    name: str
    case: Case
    spaces: Mapping[str, Mapping[str, Space]]
    invariants: Mapping[str, Expression]


def declared_by(specification: Specification) -> Declared:
    """What a specification declares.

    Raises:
      ExpressionError: its spaces or invariants are not as they must be.
    """
    spaces = spaces_of(specification)
    for kernel, by_target in spaces.items():
        for target, space in by_target.items():
            if target not in TARGETS:
                raise ExpressionError(f"kernels.{kernel}.{target}: of {', '.join(TARGETS)}")
            tiles_in(kernel, space)
    case = training_attention(specification.config)
    if case is None:
        described = specification.model.described
        raise ExpressionError(f"{specification.name} is {described}: it has no attention to tune")
    return Declared(
        specification.name,
        case,
        spaces,
        _of_kernels(specification.invariant),
    )


def spaces_of(specification: Specification) -> dict[str, dict[str, Space]]:
    """The design spaces of a specification, by the names that kernels have now, and target."""
    spaces: dict[str, dict[str, Space]] = {}
    for kernel, by_target in specification.kernels.items():
        spaces.setdefault(current_name(kernel), {}).update(by_target)
    return spaces


def tiles_in(kernel: str, space: Space) -> list[dict[str, int]]:
    """All tiles of a design space, by rising size.

    Args:
      kernel: of `tiles.KERNELS`.
      space: choices by setting, such as `{"num_warps": [2, 4]}`.

    Raises:
      ExpressionError: there is no such kernel, its settings are others, or a number is no power of
        two.
    """
    if kernel not in tiles.KERNELS:
        raise ExpressionError(f"kernels.{kernel}: there are {', '.join(tiles.KERNELS)}")
    settings = ("num_warps",) if kernel in tiles.FUSED_ROW_KERNELS else flash.BlockSizes._fields
    if set(space) != set(settings):
        raise ExpressionError(
            f"kernels.{kernel} has {', '.join(space)}: its settings are {', '.join(settings)}"
        )
    for name, choices in space.items():
        for choice in choices:
            # Stages of a pipeline may be any number.
            if name != "num_stages" and (choice < 1 or choice & (choice - 1)):
                raise ExpressionError(f"kernels.{kernel}: {name} = {choice} is no power of two")
    choices = itertools.product(*(sorted(space[name]) for name in settings))
    tried = [dict(zip(settings, choice, strict=True)) for choice in choices]
    return sorted(tried, key=lambda tile: tile.get("block_q", 1) * tile.get("block_k", 1))


def tile_to_judge(target: str, case: Case, kernel: str, space: Space) -> dict[str, int] | None:
    """The smallest tile of a design space; None where the one in use lies in the space.

    Raises:
      ExpressionError: as `tiles_in`.
    """
    declared = tiles_in(kernel, space)
    return None if attention_case.settings_of(target, case, kernel) in declared else declared[0]


def broken_invariants(declared: Declared, target: str, reports: Sequence[Report]) -> list[str]:
    """Names of the invariants that a kernel with these reports breaks."""

    def lookup(path: language.Path) -> language.Value:
        if path[0] == "target":
            return gpu_metrics.of_target(target, path)
        return gpu_metrics.of_kernels(reports, path)

    return [n for n, check in declared.invariants.items() if check.check(lookup).holds is False]


def with_claim(text: str, name: str, claim: str, files: Mapping[str, str], holds: str) -> str:
    """A specification's text with a claim at its end; one of that name gives way to it."""
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


def _of_kernels(stated: Sequence[Invariant]) -> dict[str, Expression]:
    found = {}
    for each in stated:
        try:
            expression = language.parse(each.check)
        except ExpressionError as error:
            raise ExpressionError(f"the invariant {each.name}, {each.check!r}: {error}") from None
        if all(path[0] in OURS for path in expression.metrics()):
            found[each.name] = expression
    return found
