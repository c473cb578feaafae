"""A scheme for tasks whose symbols stand in the cells of a grid."""

import math

import jax.numpy as jnp
import numpy as np

from spak_jax.positions.base import GRID_ROW, PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS


@POSITIONS.register("grid-bias")
class GridBias(PositionScheme):
    """Learned biases of the steps between two cells: `model.max_relative_distance` = 1 tells a cell
    itself and its four neighbours apart, 2 all that are at most two steps away, and so on.

    Cells further away have no bias, and under a window they are masked. What has no place (`=`
    before a problem in place) is seen from every cell, and sees no cell under a window.

    Attention knows ids in a line. Cells are counted row by row, rows so far apart that no
    difference of two ids is that of two steps: how far follows from the number of tokens, for the
    grid is taken to have no more columns than the root of it, as a square has. So a table of two
    numbers a step serves grids of any size.
    """

    has_ids = True
    needs_position_ids = True
    grid_ids = True

    def __init__(self, settings, *, rngs):
        self.distance = settings.max_relative_distance

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        length = tokens.shape[-1]
        entries = self.bias_entries(length, self.distance)
        row, column = jnp.divmod(position_ids - 1, GRID_ROW)
        # From 0, no place, all cells are too far.
        in_line = len(entries) // 2 + row * row_stride(length, self.distance) + column
        ids = jnp.where(position_ids > 0, in_line, 0)
        return PositionInputs(position_ids=ids, bias_entries=entries)

    @classmethod
    def initial_bias(cls, heads, max_relative_distance):
        """float32 `[heads, steps + 1]`: of each of the steps, the last for keys without a place."""
        return jnp.zeros((heads, len(steps(max_relative_distance)) + 1), jnp.float32)

    @classmethod
    def bias_entries(cls, length, max_relative_distance):
        apart, known = row_stride(length, max_relative_distance), steps(max_relative_distance)
        clip = max_relative_distance * apart + 1
        entries = np.full(2 * clip + 2, -1, np.int32)
        for entry, (rows, columns) in enumerate(known):
            entries[clip + rows * apart + columns] = entry
        entries[-1] = len(known)
        return entries


def steps(distance: int) -> list[tuple[int, int]]:
    """Rows and columns from a key's cell to a query's that is at most so many steps away."""
    reach = range(-distance, distance + 1)
    return [(r, c) for r in reach for c in reach if abs(r) + abs(c) <= distance]


def row_stride(length: int, distance: int) -> int:
    """Ids from a cell to the one below it, in rows of so many tokens."""
    return math.isqrt(length) + 2 * distance
