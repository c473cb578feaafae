"""The shapes that tiles are chosen, compiled and timed for."""

import argparse
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of q, k and v, `[batch, length, heads, head_dim]`."""

    batch: int
    length: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class StreamShape(NamedTuple):
    """Tokens of a batch, and channels of each."""

    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}"


def parse_shape(text: str) -> Shape:
    """`128x64x4x64` as a `Shape`, for a command line.

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected BATCHxLENGTHxHEADSxHEAD_DIM")
    return Shape(*map(int, parts))


# A training step of the configurations: 256, 768 and 128 wide, the quickstart; one problem a row.
TRAINING = (
    Shape(128, 64, 4, 64),
    Shape(128, 64, 12, 64),
    Shape(128, 64, 4, 32),
    Shape(128, 16, 4, 12),
    Shape(1024, 24, 4, 64),
)
# Scoring pads rows to a multiple of 16 tokens; 12 digits take 48, 16 digits 64.
SCORING = tuple(
    Shape(512, length, heads, head_dim)
    for heads, head_dim in ((4, 64), (12, 64), (4, 32), (4, 12))
    for length in (16, 32, 48, 64)
)
# Beyond a program's row: the training rows of longer additions, and language-model sizes.
LONG = (
    Shape(32, 128, 4, 64),
    Shape(16, 512, 4, 64),
    Shape(4, 4096, 16, 64),
    Shape(4, 4096, 16, 128),
)
# The models that generalise have short heads, ids, a bias and a window.
WINDOWED_TRAINING = (Shape(512, 24, 4, 16), Shape(512, 24, 2, 4))
WINDOWED_SCORING = (Shape(512, 320, 4, 16), Shape(64, 3072, 4, 16))
