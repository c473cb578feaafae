"""A task of one's own in one file: Caesar's cipher, each letter becomes the third one after it.

    python examples/caesar.py train quickstart data.task=caesar name=caesar
    python examples/caesar.py solve runs/caesar abcabcab

Every command of `spak` knows the task then, and so does a notebook that imports this file.
"""

import jax
import jax.numpy as jnp

import spak_jax as spak


@spak.TASKS.register("caesar")
class Caesar(spak.Task):
    symbols = "abcdefgh"
    unit = "letters"

    def answers(self, problems):
        return (problems.inputs[..., 0, :] + 3) % len(self.symbols), problems.lengths[..., 0]

    def solve(self, problem):
        return problem[0].translate(str.maketrans("abcdefgh", "defghabc"))

    def position_ids(self, tokens):
        """A letter and what it becomes share an id, 2, 3, 4 ... from the first; `=`, which chooses
        the first letter of the answer, has 1."""
        place = jnp.arange(tokens.shape[-1])
        after_equals = jnp.where(tokens == self.equals, place + 1, 0)
        start = jax.lax.cummax(after_equals, axis=tokens.ndim - 1)
        return jnp.where(tokens == self.end, 0, place - start + 2).astype(jnp.int32)


if __name__ == "__main__":
    spak.main()
