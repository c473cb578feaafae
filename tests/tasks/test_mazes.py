"""Mazes: trees that hang together, the shortest path through any, and what is no maze."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spak_jax.tasks.base import Problems
from spak_jax.tasks.mazes import Mazes

MAZES = Mazes()
SIDE = 5
depths = jax.jit(MAZES.depths)
answers = jax.jit(MAZES.answers)


def cells_of(problems) -> list[str]:
    rows = zip(np.asarray(problems.inputs), np.asarray(problems.lengths), strict=True)
    return ["".join(MAZES.symbols[i] for i in row[0, : n[0]]) for row, n in rows]


def around(cells: str, at: int) -> list[int]:
    """The free cells around one."""
    side = math.isqrt(len(cells))
    row, column = divmod(at, side)
    found = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    inside = [r * side + c for r, c in found if 0 <= r < side and 0 <= c < side]
    return [i for i in inside if cells[i] != "#"]


def steps_between(cells: str, start: int, goal: int) -> float:
    """Of the shortest path: all lengths are tried, by which cells can be reached in so many."""
    reached, steps = {start}, 0
    while goal not in reached:
        more = reached.union(*(around(cells, i) for i in reached))
        if more == reached:
            return math.inf
        reached, steps = more, steps + 1
    return steps


def test_a_maze_is_a_tree_of_all_its_rooms():
    draw = jax.jit(MAZES.sample_input, static_argnums=2)
    symbols, lengths = map(np.asarray, draw(jax.random.key(2), np.full(120, 6), 6))
    assert symbols.shape == (120, 121) and sorted({*lengths.tolist()}) == [1, 9, 25, 49, 81, 121]
    for row, length in zip(symbols, lengths, strict=True):
        assert not row[length:].any()
        cells, side = "".join(MAZES.symbols[i] for i in row[:length]), math.isqrt(length)
        rooms = [r * side + c for r in range(0, side, 2) for c in range(0, side, 2)]
        free = [i for i in range(length) if cells[i] != "#"]
        assert {*rooms} <= {*free} and len(free) == 2 * len(rooms) - 1
        assert all(steps_between(cells, rooms[0], room) < math.inf for room in rooms)
        # Ends are rooms, and two where there are two.
        assert cells.count("G") == 1 and cells.count("S") == (length > 1)
        assert {cells.find("G"), cells.find("S")} - {-1} <= {*rooms}


def test_mazes_of_a_key_differ_and_all_are_met():
    """Of 2 x 2 rooms there are 12 pairs of ends, and from the start a walk goes one way round."""
    problems = MAZES.sample_exact(jax.random.key(3), 2, 4_800)
    _, counts = np.unique(problems.inputs, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260


@settings(max_examples=20)
@given(
    walls=st.lists(st.booleans(), min_size=SIDE**2, max_size=SIDE**2),
    ends=st.lists(st.integers(0, SIDE**2 - 1), min_size=2, max_size=2, unique=True),
)
def test_any_maze_is_solved(walls, ends):
    """Of several shortest paths all are marked; a maze without one is refused."""
    cells = ["#" if wall else "." for wall in walls]
    cells[ends[0]], cells[ends[1]] = "S", "G"
    cells = "".join(cells)
    shortest = steps_between(cells, *ends)
    if shortest == math.inf:
        with pytest.raises(ValueError, match="no path leads from S to G"):
            MAZES.parse(MAZES.format((cells,)), 3)
        return
    through = [sum(steps_between(cells, end, i) for end in ends) for i in range(len(cells))]
    passable = [cells[i] != "#" for i in range(len(cells))]
    expected = "".join(
        "*" if free and n == shortest else "." for free, n in zip(passable, through, strict=True)
    )
    assert MAZES.parse(MAZES.format((cells,)), 3) == (cells,)
    assert MAZES.solve((cells,)) == expected
    problems = MAZES.pad(MAZES.arrays([(cells,)]), 30)
    found, lengths = map(np.asarray, answers(problems))
    assert lengths.tolist() == [SIDE**2]
    assert "".join(MAZES.symbols[i] for i in found[0, : SIDE**2]) == expected
    assert depths(problems).tolist() == [shortest]


def test_paths_of_mazes_of_all_sizes_in_one_batch():
    draw = jax.jit(MAZES.sample_input, static_argnums=2)
    symbols, lengths = draw(jax.random.key(4), np.full(40, 9), 9)
    problems = Problems(symbols[:, None], lengths[:, None])
    every = cells_of(problems)
    found = np.asarray(answers(problems)[0])
    expected = []
    for cells, row in zip(every, found, strict=True):
        solved = MAZES.solve((cells,))
        assert "".join(MAZES.symbols[i] for i in row[: len(cells)]) == solved
        # In a tree a path is what is left of it: its cells, and one step fewer.
        expected.append(solved.count("*") - 1)
    assert depths(problems).tolist() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("S.G.", "4 cells: a maze is a square with an odd number a side"),
        ("S......G", "8 cells: a maze is a square"),
        ("S../##./G.", "rows must have 3 cells each"),
        ("S../##./...", "one S and one G"),
        ("S.S/##./G..", "one S and one G"),
        ("S", "one S and one G, in a maze of one room G"),
        ("S*./##./G..", "a maze has no *"),
        ("S../###/G..", "no path leads from S to G"),
        ("S../##./G..=****.****", r"is wrong: it is \*\*\*\.\.\*\*\*\*"),
        ("S..x##.xG..", r"is not a problem such as S\.\./##\./G\.\."),
    ],
)
def test_what_is_no_maze_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        MAZES.parse(text, 9)
    assert MAZES.parse("G", 9) == ("G",) and MAZES.solve(("G",)) == "*"


def test_ids_are_of_cells_however_a_problem_is_written():
    """`=` has no place, what fills a row up is below all mazes."""
    problems = MAZES.arrays([("S..##.G..",), ("G",)])
    cell = lambda side: [r * 2**15 + c + 1 for r in range(side) for c in range(side)]  # noqa: E731
    for answered in ("symbol-by-symbol", "one-pass", "in-place"):
        task = Mazes(answered)
        tokens = np.asarray(task.batch(problems, 24).tokens)
        ids = np.asarray(task.position_ids(tokens))
        below = ids.max()
        assert below >= 2**31 - 2**15
        for row, side in zip(ids.tolist(), (3, 1), strict=True):
            maze = cell(side)
            if answered == "in-place":
                expected = [0, *maze]
            else:
                expected = [*maze, 0, *maze]
                # The newline's blank is in the row below the answer.
                expected += [side * 2**15 + 1] * (answered == "one-pass")
            assert row == expected + [below] * (24 - len(expected))


def test_problems_in_one_row_have_ids_of_their_own():
    text = "S..##.G..=***..****\nG=*\nG..#.#..S="
    ids = np.asarray(MAZES.position_ids(np.array([MAZES.encode(text)])))[0]
    alone = np.asarray(MAZES.position_ids(np.array([MAZES.encode("G..#.#..S=")])))[0]
    assert ids[-10:].tolist() == alone.tolist() and ids[20:23].tolist() == [1, 0, 1]
