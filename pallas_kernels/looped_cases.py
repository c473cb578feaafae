"""What `compile` compiles of `looped_block`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import looped, targets, tiles
from pallas_kernels.looped import Weights
from pallas_kernels.shapes import Shape

VOCABULARY = 13
LOOPS = 12


@dataclass(frozen=True)
class LoopedCase:
    """All loops of one block, with all that its kind of model asks for, until every token halts.

    shape: of a head's queries, so that the width is heads times head_dim. dtype: of the products.
    windowed: positions by ids, bias and window, with the input added and the state under a norm
    before each loop, halting when still; else RoPE, halting when sure. hidden: channels of the MLP,
    None for four widths. settings: a `looped.Tile`, as `tiles.settings` gives it; the table's where
    there are none.
    """

    shape: Shape
    dtype: str = "bfloat16"
    windowed: bool = False
    hidden: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    multiplies = True
    backward = False
    kernels = (tiles.LOOPED,)

    @property
    def width(self) -> int:
        return self.shape.heads * self.shape.head_dim

    @property
    def key(self) -> str:
        """Of the table's line that it is launched by."""
        channels, item_size = looped.channels_of(self.width), jnp.dtype(self.dtype).itemsize
        return tiles.looped_key(self.shape.length, channels, item_size)

    def extras(self) -> str:
        """What kind of model it is, in words."""
        kind = "ids, bias, window, input, norm, still" if self.windowed else "RoPE, sure"
        return kind if self.dtype == "bfloat16" else f"{kind}, {self.dtype}"

    def program(self, target: str) -> tuple[Callable, tuple]:
        """A function, and the shapes of its arguments."""
        batch, length, heads, _ = self.shape
        hidden = self.hidden or 4 * self.width
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        weights = Weights(
            norm1=array(self.width),
            qkv=array(self.width, 3 * self.width),
            attention_out=array(self.width, self.width),
            norm2=array(self.width),
            mlp_in=array(self.width, hidden),
            mlp_out=array(hidden, self.width),
            final_norm=array(self.width),
            head=array(VOCABULARY, self.width),
            steps=array(1 if self.windowed else LOOPS, self.width),
            bias_table=array(heads, 4) if self.windowed else None,
        )
        x, thresholds = array(batch, length, self.width), array(batch, length)
        ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def function(x, weights, ids, thresholds):
            with targets.compiling_for(target):
                return looped.looped_block(
                    x,
                    weights,
                    heads=heads,
                    loops=LOOPS,
                    dtype=self.dtype,
                    positions=None if self.windowed else jnp.arange(length),
                    ids=ids if self.windowed else None,
                    window=1 if self.windowed else None,
                    thresholds=thresholds,
                    rule="still" if self.windowed else "sure",
                    inject_input=self.windowed,
                    normalize_state=self.windowed,
                    implementation="pallas",
                    cut=looped.Tile(**self.settings) if self.settings else None,
                )

        return function, (x, weights, ids, thresholds)


# Rows of the configurations, with the 64 tokens that scoring gives a problem: 256, 128 and 64 wide,
# the models that generalise in float32; and rows of 128 tokens.
LOOPED_CASES = [
    *(LoopedCase(Shape(128, 64, 4, head_dim)) for head_dim in (64, 32, 16)),
    LoopedCase(Shape(64, 128, 4, 32)),
    LoopedCase(Shape(128, 64, 4, 8), "float32", windowed=True),
    LoopedCase(Shape(128, 64, 2, 4), "float32", windowed=True, hidden=24),
]
