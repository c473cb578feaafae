"""Which tile each kernel gets on each target, and what that choice rests on: `tiles.toml`.

`python -m pallas_kernels.tune --write` measures on the GPU at hand and writes the file anew.
"""

import functools
import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pallas_kernels.kernel_names import current_name
from pallas_kernels.padding import padded, padded_head

FILE = Path(str(resources.files("pallas_kernels"))) / "tiles.toml"
FUSED_ROW_KERNELS = ("fused_row_forward", "fused_row_backward")
FLASH_KERNELS = ("flash_forward", "flash_d_q", "flash_d_kv")
KERNELS = FUSED_ROW_KERNELS + FLASH_KERNELS
LOOPED = "looped_block"

# With biases, longer whole rows want more registers than there are.
LONGEST_BIASED_ROW = 64

HEAD = """\
# Which tile each kernel gets on each target, and the evidence for it: a time on the chip itself, or
# what the compiler says where nobody here has the chip. Written by `python -m pallas_kernels.tune
# --write`; lines for other targets than the GPU it runs on stay as they are.
#
# Keys: rows that one program holds (whole-row kernels; rows without a line here are streamed),
# channels of a head, padded to a power of two, and bits of a number. `cudnn_from`: the length from
# which on cuDNN is faster, for calls that it can take at all. `looped_block`: tokens of a
# program, channels of the state, padded, and bits; states without a line here are left to a scan.
"""


def settings(target: str, kernel: str, key: str) -> dict[str, Any] | None:
    """Arguments that launch a kernel; None where the table says nothing for the key."""
    entry = table()[target].get(kernel, {}).get(key)
    return entry and {name: value for name, value in entry.items() if name != "evidence"}


def evidence(target: str, kernel: str, key: str) -> str:
    """What a choice rests on."""
    return table()[target][kernel][key]["evidence"]


def streamed(
    target: str, kernel: str, head_dim: int, item_size: int, *, with_ids: bool
) -> dict[str, Any]:
    """Arguments that launch a streaming kernel."""
    key = streamed_key(target, kernel, head_dim, item_size, with_ids=with_ids)
    return settings(target, kernel, key)


def streamed_key(target: str, kernel: str, head_dim: int, item_size: int, *, with_ids: bool) -> str:
    """Key of a streaming kernel's line.

    Ids, biases and windows want registers: some tiles that suit plain calls are not for them.
    """
    plain = head_key(head_dim, item_size)
    own = f"{plain}, with ids"
    return own if with_ids and settings(target, kernel, own) else plain


def whole_row(
    target: str, kernel: str, length: int, head_dim: int, item_size: int, *, biased: bool
) -> dict[str, Any] | None:
    """Arguments that launch a whole-row kernel; None where the row is to be streamed."""
    if biased and length > LONGEST_BIASED_ROW:
        return None
    return settings(target, kernel, key(kernel, length, head_dim, item_size))


def key(kernel: str, length: int, head_dim: int, item_size: int) -> str:
    """Key of a kernel's line for numbers of `item_size` bytes."""
    if kernel in FUSED_ROW_KERNELS:
        return f"{padded(length)} rows, head {padded_head(head_dim)}, {8 * item_size} bits"
    return head_key(head_dim, item_size)


def looped_tokens(length: int) -> int:
    """Tokens that a program of `looped_block` holds: a row, or as many as fit."""
    return 64 if length <= 64 else 128


def looped_key(length: int, channels: int, item_size: int) -> str:
    """Key of a line for `looped_block`, by the channels that its state takes on the chip."""
    return f"{looped_tokens(length)} tokens, width {channels}, {8 * item_size} bits"


def head_key(head_dim: int, item_size: int) -> str:
    """Key of what goes by the head alone, streaming kernels and `cudnn_from`; small heads share
    one."""
    return f"head {max(64, padded_head(head_dim))}, {8 * item_size} bits"


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """The file: target, kernel, key, and what is said for it."""
    return read(FILE)


def read(path: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """A file that `as_text` gave the form of; a `ValueError` where it is no TOML."""
    targets = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        target: {current_name(kernel): entries for kernel, entries in kernels.items()}
        if isinstance(kernels, dict)
        else kernels
        for target, kernels in targets.items()
    }


def as_text(table: dict) -> str:
    """A table as `table` returns it in the file's form, one line a choice."""
    lines = [HEAD]
    for target, kernels in table.items():
        for kernel, entries in kernels.items():
            lines.append(f"[{target}.{kernel}]")
            for key, entry in sorted(entries.items(), key=lambda item: _numbers(item[0])):
                # JSON's strings, numbers and booleans are TOML's.
                pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in entry.items())
                lines.append(f'"{key}" = {{ {pairs} }}')
            lines.append("")
    return "\n".join(lines)


def _numbers(key: str) -> tuple[int, ...]:
    """Bits, head and rows of a key: the order of the file."""
    return tuple(int(number) for number in reversed(re.findall(r"\d+", key)))
