"""What is compiled for GPUs that are not there: operations at shapes, and what is asked of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from pallas_kernels.tuning import attention_case, looped_case, stream_cases
from pallas_kernels.tuning.shapes import (
    LONG,
    SCORING,
    TRAINING,
    WINDOWED_SCORING,
    WINDOWED_TRAINING,
    Shape,
    StreamShape,
)

ATTENTION, LOOPED = "attention", "looped_block"
# What knows the kernels and the program of each operation.
OPERATIONS = {
    ATTENTION: attention_case,
    LOOPED: looped_case,
    **dict.fromkeys(stream_cases.OPERATIONS, stream_cases),
}
DROPOUT = 0.1
# Of the ids of biases and windows.
CLIP = 15


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    operation: of `OPERATIONS`. shape: of q, k, v, or of the stream; the numbers of "gelu" are four
    times as many. dtype: of the products, its name. rope: whether q and k are turned. rate: of
    dropout. clip: of the ids of a bias table and a window, None for neither. backward: whether with
    gradients. hidden: channels of a looped block's MLP, None for four widths. kernel: one of
    attention's alone, launched by `settings`; None for those that the operation takes. settings: of
    the one kernel that there is; empty for those of the table.
    """

    operation: str
    shape: Shape | StreamShape
    dtype: str = "bfloat16"
    rope: bool = True
    rate: float = 0.0
    clip: int | None = None
    backward: bool = True
    hidden: int | None = None
    kernel: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def item_size(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def multiplies(self) -> bool:
        """Whether with matrices: where nothing is multiplied, no tensor cores are missed."""
        return self.operation not in stream_cases.WITHOUT_PRODUCTS

    def kernels(self, target: str) -> tuple[str, ...]:
        """Names of its kernels on a target; the first is the forward pass."""
        return OPERATIONS[self.operation].kernels(self, target)

    def asked(self) -> str:
        """What is asked for beside its main inputs, in words."""
        return OPERATIONS[self.operation].asked(self)

    def program(self, target: str) -> tuple[Callable, tuple]:
        """A function to compile, and its arguments as `jax.ShapeDtypeStruct`s."""
        return OPERATIONS[self.operation].program(self, target)


def attention_cases(shapes: Iterable[Shape], **asked) -> list[Case]:
    """Attention at some shapes; of those that differ in batch and heads alone, the first."""
    return _distinct(Case(ATTENTION, shape, **asked) for shape in shapes)


def standard_cases() -> list[Case]:
    """All shapes of `shapes`: training with dropout, scoring forward only, long rows both without
    and with everything a call can ask for, rows with a window over ids; the stream's operations and
    looped blocks. Of attention's shapes that differ in batch and heads alone, the first."""
    attention = [
        *attention_cases(TRAINING, rate=DROPOUT),
        *attention_cases(SCORING, backward=False),
        *attention_cases(LONG),
        *attention_cases(LONG, rate=DROPOUT, clip=CLIP),
        *attention_cases(WINDOWED_TRAINING, rope=False, clip=1),
        *attention_cases(WINDOWED_SCORING, rope=False, clip=1, backward=False),
    ]
    return _distinct(attention) + stream_standard_cases() + looped_standard_cases()


def stream_standard_cases() -> list[Case]:
    """The operations around the residual stream, with gradients, at the widths they are for."""
    return [
        Case(operation, shape, rate=DROPOUT)
        for operation in stream_cases.OPERATIONS
        for shape in stream_cases.SHAPES
        if stream_cases.is_for(operation, shape.width)
    ]


def looped_standard_cases() -> list[Case]:
    """Rows of the configurations, with the 64 tokens that scoring gives a problem: 256, 128 and 64
    wide, the models that generalise in float32; and rows of 128 tokens."""
    looped = functools.partial(Case, LOOPED, backward=False)
    windowed = {"dtype": "float32", "rope": False, "clip": 1}
    return [
        *(looped(Shape(128, 64, 4, head_dim)) for head_dim in (64, 32, 16)),
        looped(Shape(64, 128, 4, 32)),
        looped(Shape(128, 64, 4, 8), **windowed),
        looped(Shape(128, 64, 2, 4), **windowed, hidden=24),
    ]


def _distinct(cases: Iterable[Case]) -> list[Case]:
    first = {}
    for case in cases:
        compiled = dataclasses.replace(case, shape=case.shape._replace(batch=1, heads=1))
        first.setdefault(repr(compiled), case)
    return list(first.values())
