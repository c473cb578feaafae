"""How many loops problems take at test time."""

import re
from typing import Any, NamedTuple

import numpy as np

from spak_jax.command_line import InputError

MAX_LOOPS = 10_000


class Loops(NamedTuple):
    """How many loops a problem takes: so many, and so many more for each symbol of its length."""

    constant: int = 0
    per_symbol: float = 0.0

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """Of problems of some sizes, int32 and at least 1."""
        return np.maximum(1, self.constant + np.ceil(self.per_symbol * sizes)).astype(np.int32)

    def described(self) -> dict[str, Any]:
        """As results hold them."""
        return {"loops": self.constant, "loops_per_symbol": self.per_symbol or None}

    def __str__(self) -> str:
        parts = [f"{self.per_symbol:g}x"] * bool(self.per_symbol)
        return "+".join(parts + [str(self.constant)] * (bool(self.constant) or not parts))

    @classmethod
    def parse(cls, text: str) -> "int | Loops":
        """Of "2x", twice the problem's length, or "2x+8"; "24" is a number for all problems.

        Raises:
          ValueError: the text is none of these, or asks for none or for more than `MAX_LOOPS`.
        """
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)x(?:\+(\d+))?|(\d+))", text, re.ASCII)
        per_symbol, more, constant = match.groups() if match else (None,) * 3
        found = cls(int(constant or more or 0), float(per_symbol or 0))
        if not (found != cls() and max(found) <= MAX_LOOPS):
            raise ValueError(
                f"{text}: must be from 1 to {MAX_LOOPS:,}, or so many times the length of each"
                " problem, such as 2x or 2x+8"
            )
        return found if found.per_symbol else found.constant


def asked_loops(text: str | None) -> int | Loops | None:
    """What `--loops` says, or None. Raises InputError where it is out of bounds."""
    try:
        return None if text is None else Loops.parse(text)
    except ValueError as error:
        raise InputError(f"--loops {error}") from None
