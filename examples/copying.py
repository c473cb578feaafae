"""A task of one's own in one file: a sequence of letters is to be written again.

    python examples/copying.py train quickstart data.task=copying name=copying
    python examples/copying.py solve runs/copying abcabcab

Every command of `spak` knows the task then, and so does a notebook that imports this file.
"""

import jax
import jax.numpy as jnp

import spak_jax as spak


@spak.TASKS.register("copying")
class Copying(spak.Task):
    symbols = "abcdefgh"
    unit = "letters"

    def answers(self, problems):
        return problems.inputs[..., 0, :], problems.lengths[..., 0]

    def solve(self, problem):
        return problem[0]

    def position_ids(self, tokens):
        """A letter and its copy share an id, 2, 3, 4 ... from the first; `=`, which chooses the
        first letter of the copy, has 1."""
        place = jnp.arange(tokens.shape[-1])
        after_equals = jnp.where(tokens == self.equals, place + 1, 0)
        start = jax.lax.cummax(after_equals, axis=tokens.ndim - 1)
        return jnp.where(tokens == self.end, 0, place - start + 2).astype(jnp.int32)


if __name__ == "__main__":
    spak.main()
