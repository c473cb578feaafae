"""A looped block as a case: all that its kind of model asks for, until every token halts.

With a clip: positions by ids, bias and window, the input added and the state under a norm before
each loop, halting by convergence; else RoPE, halting by confidence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import targets, tiles
from pallas_kernels.ops import looped
from pallas_kernels.padding import padded

VOCABULARY = 13
LOOPS = 12


def kernels(case, target: str) -> tuple[str, ...]:
    """Names of its kernels on a target, forward first."""
    return (tiles.LOOPED,)


def asked(case) -> str:
    """What is asked for beside its main inputs, in words."""
    windowed = case.clip is not None
    kind = "ids, bias, window, input, norm, convergence" if windowed else "RoPE, confidence"
    return kind if case.dtype == "bfloat16" else f"{kind}, {case.dtype}"


def width_of(case) -> int:
    """Of its state."""
    return case.shape.heads * case.shape.head_dim


def key(case) -> str:
    """Of the table's line that it is launched by."""
    return tiles.looped_key(case.shape.length, padded(width_of(case)), case.item_size)


def program(case, target: str) -> tuple[Callable, tuple]:
    """A function of the first state, the weights, ids and thresholds; their shapes."""
    batch, length, heads, _ = case.shape
    width, windowed = width_of(case), case.clip is not None
    hidden = case.hidden or 4 * width
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    weights = looped.Weights(
        norm1=array(width),
        qkv=array(width, 3 * width),
        attention_out=array(width, width),
        norm2=array(width),
        mlp_in=array(width, hidden),
        mlp_out=array(hidden, width),
        final_norm=array(width),
        head=array(VOCABULARY, width),
        steps=array(1 if windowed else LOOPS, width),
        bias_table=array(heads, 2 * case.clip + 2) if windowed else None,
    )
    x, thresholds = array(batch, length, width), array(batch, length)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def function(x, weights, ids, thresholds):
        with targets.compiling_for(target):
            return looped.looped_block(
                x,
                weights,
                heads=heads,
                loops=LOOPS,
                dtype=case.dtype,
                positions=None if windowed else jnp.arange(length),
                ids=ids if windowed else None,
                window=case.clip,
                thresholds=thresholds,
                rule="convergence" if windowed else "confidence",
                inject_input=windowed,
                normalize_state=windowed,
                implementation="pallas",
                block_sizes=looped.BlockSizes(**case.settings) if case.settings else None,
            )

    return function, (x, weights, ids, thresholds)
