"""Mazes: which cells lie on the shortest path from the start to the goal.

As Bansal et al. 2022 (End-to-end Algorithm Synthesis with Recurrent Networks, arXiv 2202.05826) and
before them Schwarzschild et al. 2021 (Datasets for Studying Generalization from Easy to Hard
Examples, arXiv 2108.06011) pose them, with a symbol for each cell in place of an image. Their mazes
of 9 x 9 are ours of length 5, five rooms a side and what is between them; 59 x 59 is length 30, and
201 x 201 is length 101. They are drawn alike: a walk from the start's room opens walls to rooms
that are new and turns back in dead ends alone (depth first), until all rooms hang together; start
and goal are two rooms, any two as likely.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.positions.base import grid_ids
from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Raster, Task

WALL, FREE, START, GOAL, PATH = range(5)
# Steps of no walk.
FAR = 2**29
# Evenly drawn below it, the remainder by 1, 2, 3 or 4 is even, too.
CHOICES = 12
# Of people's mazes, between rows.
BETWEEN = "/"


@TASKS.register("mazes")
class Mazes(Task):
    """`S../##./G..`, the rows of a maze: `#` walls, `.` free cells, `S` start and `G` goal. In the
    answer, `***..****`, all cells of the shortest path are `*` (of all shortest ones, if there are
    several), start and goal too, and all others `.`.

    A maze of n rooms a side is a square of 2 n - 1 cells a side, rooms and what is between them,
    without a wall around it. Where there is one room it is `G`, start and goal.
    """

    symbols = "#.SG*"
    unit = "rooms a side"
    grid_ids = True

    def input_length(self, length: int) -> int:
        return (2 * length - 1) ** 2

    def size_of(self, symbols: int) -> int:
        if isinstance(symbols, int):
            return (math.isqrt(symbols) + 1) // 2
        # A quarter more: the root is rounded.
        return ((symbols.astype(np.float32) ** 0.5 + 1) / 2 + 0.25).astype(np.int32)

    def answers(self, problems: Problems):
        lengths = problems.lengths[..., 0]
        from_start, from_goal = jnp.moveaxis(self._distances(problems), -2, 0)
        whole = from_start + from_goal
        path = (whole < FAR) & (whole == whole.min(-1, keepdims=True))
        return jnp.where(path, PATH, FREE).astype(jnp.uint8), lengths

    @property
    def depth_unit(self) -> str:
        return "steps"

    def depths(self, problems: Problems) -> jax.Array:
        """Steps of the shortest path, int32 `[...]`."""
        if isinstance(problems.inputs, np.ndarray):
            # Nothing is compiled for arrays of the host.
            batch, width = problems.lengths.shape[:-1], problems.width
            rows = zip(problems.inputs.reshape(-1, width), problems.lengths.ravel(), strict=True)
            every = ("".join(self.symbols[i] for i in row[:count]) for row, count in rows)
            steps = [_walked(cells, cells.index("G"))[_start(cells)] for cells in every]
            return np.array(steps, np.int32).reshape(batch)
        return self._distances(problems).sum(-2).min(-1)

    def _distances(self, problems: Problems) -> jax.Array:
        """Steps from the start and from the goal to each cell, int32 `[..., 2, width]`; as far as
        they were counted until both had met, and `FAR` for other cells."""
        cells = problems.inputs[..., 0, :]
        count = problems.lengths.astype(jnp.int32)
        place, side = jnp.arange(cells.shape[-1]), 2 * self.size_of(count) - 1
        column = place % side
        # Left, right, up and down of each cell, and whether there is such a cell.
        beside = [(place - 1, column > 0), (place + 1, column < side - 1)]
        beside += [(place - side, place >= side), (place + side, place + side < count)]
        start, goal = cells == START, cells == GOAL
        start |= goal & ~start.any(-1, keepdims=True)
        goals = jnp.stack([goal, start], -2)
        is_open = (cells != WALL)[..., None, :]

        def step(carry):
            taken, distances, _ = carry
            reached, near = distances < FAR, jnp.zeros(distances.shape, bool)
            for other, exists in beside:
                other = jnp.broadcast_to(jnp.where(exists, other, 0), cells.shape)[..., None, :]
                near |= jnp.take_along_axis(reached, other, -1) & exists[..., None, :]
            fresh = near & is_open & ~reached
            unmet = ~(reached & goals).any(-1, keepdims=True)
            distances = jnp.where(fresh, taken, distances)
            return taken + 1, distances, (fresh & unmet).any()

        first = jnp.where(jnp.stack([start, goal], -2), 0, FAR).astype(jnp.int32)
        carry = jnp.int32(1), first, jnp.bool_(True)
        return jax.lax.while_loop(lambda carry: carry[2], step, carry)[1]

    def solve(self, problem: tuple[str, ...]) -> str:
        (cells,) = problem
        goal = cells.index("G")
        from_start, from_goal = _walked(cells, _start(cells)), _walked(cells, goal)
        return "".join(
            "*" if from_start.get(i, FAR) + from_goal.get(i, FAR) == from_start[goal] else "."
            for i in range(len(cells))
        )

    def sample_input(self, key: jax.Array, at_most: jax.Array, width: int):
        """A maze of at most `at_most` rooms a side: first how many, uniform, then the maze."""
        size_key, key = jax.random.split(key)
        sizes = jax.random.randint(size_key, at_most.shape, 1, at_most + 1, dtype=jnp.int32)
        cells = draw(key, sizes.reshape(-1), width)
        return cells.reshape(*sizes.shape, -1), self.input_length(sizes)

    def sample_exact(self, key: jax.Array, length: int, count: int) -> Problems:
        # Rounded up to powers of two, so that few programs serve all lengths and counts.
        width, rounded = (1 << (n - 1).bit_length() for n in (length, count))
        with jax.threefry_partitionable(True):
            drawn = _draw(key, np.full(rounded, length, np.int32), width)
        symbols = self.input_length(length)
        cells = np.asarray(drawn)[:count, None, :symbols]
        return Problems(cells, np.full((count, 1), symbols, np.int32))

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """Those of a grid (`positions.base.grid_ids`): a cell and its answer share an id. `=` has
        no place, 0, and newlines are in a row below all others, out of sight.

        How many columns there are is read from the number of symbols up to the next token that is
        none, of an answer from that of its maze: all of a maze must be there, not its answer.
        """
        symbol, length = self.is_symbol(tokens), tokens.shape[-1]
        t, axis = jnp.arange(length), tokens.ndim - 1
        # The others next to each token, before it and behind it.
        before = jax.lax.cummax(jnp.where(symbol, -1, t), axis=axis)
        behind = jax.lax.cummin(jnp.where(symbol, length, t), axis=axis, reverse=True)
        at = lambda of_all, place: jnp.take_along_axis(of_all, jnp.maximum(place, 0), axis)  # noqa: E731
        answer = (at(tokens, before) == self.equals) & (before > 0)
        maze = jnp.where(answer, before - 1, t)
        side = 2 * self.size_of(at(behind, maze) - at(before, maze) - 1) - 1
        place = t - before - 1
        cells = grid_ids(*jnp.divmod(place, jnp.maximum(side, 1)))
        hidden = grid_ids(jnp.int32(2**16 - 1), 0)
        others = jnp.where(tokens == self.equals, 0, hidden)
        return jnp.where(symbol, cells, others).astype(jnp.int32)

    def raster(self, problem) -> Raster:
        colours = {"#": "0.25", "S": "#009E73", "G": "#D55E00", "*": "#56B4E9"}
        return Raster(math.isqrt(len(problem[0])), colours)

    @property
    def example(self) -> tuple[str, ...]:
        return ("S..##.G..",)

    def parse(self, text: str, longest: int) -> tuple[str, ...]:
        """As of every task; rows may have `/` between them, `S../##./G..`, or not."""
        return super().parse("=".join(map(_joined, text.split("="))), longest)

    def format(self, problem) -> str:
        """`S../##./G..`."""
        side = math.isqrt(len(problem[0]))
        rows = range(0, len(problem[0]), side)
        return BETWEEN.join(problem[0][i : i + side] for i in rows)

    def check(self, problem: tuple[str, ...]) -> None:
        (cells,) = problem
        side = math.isqrt(len(cells))
        if side**2 != len(cells) or side % 2 == 0:
            raise ValueError(f"{len(cells)} cells: a maze is a square with an odd number a side")
        if "*" in cells:
            raise ValueError("a maze has no *: that is of its answer")
        starts = 1 if len(cells) > 1 else 0
        if cells.count("S") != starts or cells.count("G") != 1:
            raise ValueError(
                f"{self.format(problem)}: there must be one S and one G, in a maze of one room G"
            )
        if starts and cells.index("S") not in _walked(cells, cells.index("G")):
            raise ValueError(f"{self.format(problem)}: no path leads from S to G")


def _joined(maze: str) -> str:
    rows = maze.split(BETWEEN)
    if len(rows) > 1 and {*map(len, rows)} != {len(rows)}:
        raise ValueError(f"{maze}: {len(rows)} rows must have {len(rows)} cells each")
    return "".join(rows)


def _start(cells: str) -> int:
    return cells.index("S" if "S" in cells else "G")


def _walked(cells: str, start: int) -> dict[int, int]:
    """The steps from a cell to each that can be reached (breadth first)."""
    side, steps, queue = math.isqrt(len(cells)), {start: 0}, collections.deque([start])
    while queue:
        row, column = divmod(at := queue.popleft(), side)
        for r, c in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
            i = r * side + c
            if 0 <= r < side and 0 <= c < side and cells[i] != "#" and i not in steps:
                steps[i] = steps[at] + 1
                queue.append(i)
    return steps


def draw(key: jax.Array, sizes: jax.Array, width: int) -> jax.Array:
    """Mazes, each a tree of all its rooms.

    Args:
      key: PRNG key.
      sizes: int32 `[batch]`, rooms a side.
      width: the most that there may be.

    Returns:
      uint8 symbols `[batch, (2 * width - 1) ** 2]`, zeros behind a maze's end.
    """
    batch, rows = len(sizes), jnp.arange(len(sizes))
    start_key, goal_key, key = jax.random.split(key, 3)
    rooms = sizes**2
    start = jax.random.randint(start_key, (batch,), 0, rooms, dtype=jnp.int32)
    others = jnp.maximum(rooms - 1, 1)
    further = 1 + jax.random.randint(goal_key, (batch,), 0, others, dtype=jnp.int32)
    goal = (start + further) % rooms
    start, goal = (room // sizes * width + room % sizes for room in (start, goal))

    came_from = _trees(key, start, sizes, width).reshape(batch, width, width)
    room = jnp.arange(width**2).reshape(width, width)
    # Of two rooms one was entered from the other where there is no wall between them.
    beside = (came_from[:, :, 1:] == room[:, :-1]) | (came_from[:, :, :-1] == room[:, 1:])
    below = (came_from[:, 1:] == room[:-1]) | (came_from[:, :-1] == room[1:])
    side = 2 * width - 1
    cells = jnp.zeros((batch, side, side), jnp.uint8)
    cells = cells.at[:, ::2, ::2].set(jnp.where(came_from >= 0, FREE, WALL).astype(jnp.uint8))
    cells = cells.at[:, ::2, 1::2].set(jnp.where(beside, FREE, WALL).astype(jnp.uint8))
    cells = cells.at[:, 1::2, ::2].set(jnp.where(below, FREE, WALL).astype(jnp.uint8))
    for place, symbol in ((start, START), (goal, GOAL)):
        cells = cells.at[rows, place // width * 2, place % width * 2].set(symbol)

    # Smaller mazes stand in the corner: their rows are to follow one another.
    own, t = 2 * sizes[:, None] - 1, jnp.arange(side**2)
    place = jnp.minimum(t // own * side + t % own, side**2 - 1)
    written = jnp.take_along_axis(cells.reshape(batch, -1), place, -1)
    return jnp.where(t < own**2, written, WALL).astype(jnp.uint8)


_draw = jax.jit(draw, static_argnums=2)


def _trees(key: jax.Array, start: jax.Array, sizes: jax.Array, width: int) -> jax.Array:
    """Of each room the one that it was first entered from, int32 `[batch, width ** 2]`, -1 outside.

    A walk goes on to one of the rooms around it that are new, each as likely, and back where there
    is none. start: the rooms where walks begin, int32 `[batch]`, which are entered from themselves.
    """
    rows, rooms = jnp.arange(len(sizes)), sizes**2
    draws = jax.random.randint(key, (2 * width**2, len(sizes)), 0, CHOICES, dtype=jnp.uint8)
    steps = jnp.array([-1, 1, -width, width], jnp.int32)

    def step(carry):
        taken, at, came_from, entered = carry
        row, column = at // width, at % width
        last = sizes - 1
        exists = jnp.stack([column > 0, column < last, row > 0, row < last], -1)
        around = jnp.where(exists, at[:, None] + steps, at[:, None])
        # A room itself is not new.
        new = jnp.take_along_axis(came_from, around, -1) < 0
        count = new.sum(-1, dtype=jnp.int32)
        which = draws[taken].astype(jnp.int32) % jnp.maximum(count, 1)
        chosen = (new & (jnp.cumsum(new, -1, dtype=jnp.int32) == which[:, None] + 1)).argmax(-1)
        room = jnp.take_along_axis(around, chosen[:, None], -1)[:, 0]
        goes = count > 0
        after = jnp.where(goes, room, came_from[rows, at])
        came_from = came_from.at[rows, jnp.where(goes, room, width**2)].set(at, mode="drop")
        return taken + 1, after, came_from, entered + goes

    came_from = jnp.full((len(sizes), width**2), -1, jnp.int32).at[rows, start].set(start)
    carry = jnp.int32(0), start, came_from, jnp.ones(len(sizes), jnp.int32)
    return jax.lax.while_loop(lambda carry: (carry[3] < rooms).any(), step, carry)[2]
