"""What a position scheme is: what it learns, and what attention is given of each sequence."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# From an id of a grid to the one below it.
GRID_ROW = 2**15


def grid_ids(row, column):
    """A task's position ids of cells of a grid, counted from 0: int32, at least 1.

    Rows may be up to 65,535, columns up to 32,766.
    """
    return (row * GRID_ROW + column + 1).astype(jnp.int32)


class PositionInputs(NamedTuple):
    """What a scheme gives the model of a batch; None for nothing.

    rope_positions: int32 `[length]` or `[batch, length]`; queries and keys are rotated by them.
    position_ids: int32 `[batch, length]`, 0 for tokens without a place, which the bias and the
    window go by; in training they may be float32. window_slack: float32 scalar, by how much further
    than `model.max_relative_distance` the window reaches; in training alone. embedding: float32
    `[batch, length, width]`, added to the embedded tokens. bias_entries: as of
    `PositionScheme.bias_entries`, of which the window is then a matter.
    """

    rope_positions: jax.Array | None = None
    position_ids: jax.Array | None = None
    window_slack: jax.Array | None = None
    embedding: jax.Array | None = None
    bias_entries: np.ndarray | None = None


class SchemeSettings(NamedTuple):
    """The sizes of the model that a scheme is part of."""

    vocabulary: int
    width: int
    max_relative_distance: int = 1


class PositionScheme(nnx.Module):
    """A way to know positions. What a subclass keeps as `nnx.Param` or module is trained and stored
    with the model, under `position_scheme`.

    No input of a token may depend on what stands behind it: models that write token by token keep
    what they have computed of earlier ones.

    Args:
      settings: the model's sizes.
      rngs: for initial values.
    """

    # Whether queries and keys are rotated: heads must then have an even number of channels.
    rotates: ClassVar[bool] = False
    # Whether there are position ids, which each block learns biases of and a window can go by.
    has_ids: ClassVar[bool] = False
    # Whether the position ids of the task are needed, and whether they must be those of a grid.
    needs_position_ids: ClassVar[bool] = False
    grid_ids: ClassVar[bool] = False
    # The share of the training up to which inputs depend on the training's progress. Schemes with 0
    # are given none.
    anneals_until: ClassVar[float] = 0.0
    # Which of the numbers that the model's key gives are the scheme's: not those of dropout.
    key_stream: ClassVar[int] = 2

    def __init__(self, settings: SchemeSettings, *, rngs: nnx.Rngs):
        pass

    def inputs(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        position_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> PositionInputs | None:
        """What the model is given of these sequences; None for nothing.

        Args:
          tokens: int `[batch, length]`.
          positions: int `[length]` or `[batch, length]`, the tokens' places in their sequences.
          position_ids: int32 `[batch, length]`, those of the task; None where there are none.
          key: PRNG key, in training alone; without one the same is given every time.
          progress: share of the training that is done; None outside training.
        """
        raise NotImplementedError

    @classmethod
    def initial_bias(cls, heads: int, max_relative_distance: int) -> jax.Array | None:
        """Each block's bias table before training; None for none.

        Returns:
          float32 `[heads, 2 * max_relative_distance + 2]`: an entry for each difference of a
          query's id and a key's, the last for keys without a place.
        """
        if not cls.has_ids:
            return None
        return jnp.zeros((heads, 2 * max_relative_distance + 2), jnp.float32)

    @classmethod
    def bias_entries(cls, length: int, max_relative_distance: int) -> np.ndarray | None:
        """Which column of each block's bias table the differences of ids have their bias from, in
        rows of `length` tokens; None where each has a column of its own.

        Returns:
          int32 `[2 * clip + 2]`, for differences from `-clip` to `clip` and keys without a place;
          -1 for differences without a bias, which a window masks.
        """
        return None
