"""How problems are divided into calls of compiled programs: few programs serve all lengths and
counts."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from spak_jax.tasks import Batch, Problems, Task

# Rows are filled up to a multiple of the step, so that many lengths share one compiled program; a
# GPU computes so fast that compiling is what counts.
ROWS_PER_CALL, ROWS_PER_CALL_ON_GPU = 512, 4096
LENGTH_STEP, LENGTH_STEP_ON_GPU = 16, 64
# Fewer rows where they are long. A GPU's kernels hold no score; plain attention holds all at once.
SCORES_PER_CALL, TOKENS_PER_CALL_ON_GPU = 2**23, 2**18


@functools.partial(jax.jit, static_argnums=(1, 2))
def batch_of(problems: Problems, length: int, task: Task) -> Batch:
    """`task.batch`, compiled."""
    return task.batch(problems, length)


def rows_per_call(length: int) -> int:
    """Problems of so many tokens that one call of a compiled program scores at most."""
    if jax.default_backend() == "gpu":
        return min(ROWS_PER_CALL_ON_GPU, power_of_two(TOKENS_PER_CALL_ON_GPU // length))
    return min(ROWS_PER_CALL, power_of_two(SCORES_PER_CALL // length**2))


def padded_length(size: int, task: Task) -> int:
    """Tokens that rows of problems are filled up to, so that one program serves many lengths."""
    step = LENGTH_STEP_ON_GPU if jax.default_backend() == "gpu" else LENGTH_STEP
    length = task.filled_length(size)
    # Longer rows by larger steps: a tenth more work, and fewer programs.
    step *= power_of_two(length // (10 * step))
    return -(-length // step) * step


def calls(
    sizes: np.ndarray, task: Task, most_rows: Callable[[int], int] = rows_per_call
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """What calls of compiled programs take: problems of one padded length together, so that a long
    one makes no short one's row longer.

    Args:
      sizes: int `[problems]`, as the task measures them.
      task: of the problems.
      most_rows: how many rows of so many tokens one call takes at most.

    Yields:
      The indices of the problems that a call answers; the same, filled up with the first of them to
      a number of rows that few programs serve; and the length of the rows.
    """
    different, which = np.unique(sizes, return_inverse=True)
    lengths = np.array([padded_length(n, task) for n in different.tolist()])[which]
    for length in np.unique(lengths).tolist():
        together = np.flatnonzero(lengths == length)
        # A power of two, so that few programs serve all counts.
        rows = min(most_rows(length), 1 << (len(together) - 1).bit_length())
        for start in range(0, len(together), rows):
            chosen = together[start : start + rows]
            filling = np.full(rows - len(chosen), chosen[0])
            yield chosen, np.concatenate([chosen, filling]), length


def power_of_two(number: int) -> int:
    """The largest one up to a number, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)
