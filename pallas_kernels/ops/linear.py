"""Products of many tokens with a block's matrices, forward and backward, and an MLP of two of them.

Three things are done that XLA leaves undone:
- The GELU and its slope are made of a product that is still on the chip, and the way back
  multiplies by the slope where it has just made the product that it belongs to.
- Weights' gradients need not be made block by block. Given a `DeferredWeightGrad`, the way back
  gives the two sides of a gradient's product as the "gradient" of that, and none of the matrix:
  whoever asked makes those of all blocks in one launch (`weight_grads`). One such product has too
  few tiles for a GPU, and has to be cut along its sum and added up again.
- Nothing is tried out while compiling, as XLA does with its own products.

Tiles are whole: sizes that are no multiples of them are left to XLA, as are those that it is faster
at.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, targets
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops import gelu
from pallas_kernels.ops.matmul import (
    DeferredWeightGrad,
    matmul,
    matmul_gelu,
    matmul_mul,
    supports,
    weight_grads,
)


class _Options(NamedTuple):
    """What is fixed when a kernel is compiled.

    dtype: of the products. deferred: whether the sides of matrices' gradients are asked for instead
    of these. interpret: whether the kernels are interpreted.
    """

    dtype: str
    deferred: bool
    interpret: bool


def linear(
    x: jax.Array,
    weights: jax.Array,
    *,
    dtype,
    deferred: DeferredWeightGrad | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x @ weights`, added up in float32.

    Args:
      x: `[..., inputs]`.
      weights: float32 `[inputs, outputs]`.
      dtype: that both are multiplied in.
      deferred: zeros (`DeferredWeightGrad.zeros`), to get the two sides of the weights' gradient as
        the gradient of these instead of the gradient of the weights; None for that.
      implementation: "xla", plain `jnp`; None takes the kernels where they are for such sizes.

    Returns:
      `[..., outputs]` in `dtype`.

    Raises:
      ValueError: shapes that do not go together, or another implementation, naming them.
    """
    arguments.require_one_of("implementation", implementation, ("xla", None))
    inputs, outputs = _sides("weights", weights, x)
    if implementation == "xla" or not supports(math.prod(x.shape[:-1]), inputs, outputs, dtype):
        return x.astype(dtype) @ weights.astype(dtype)
    flat = x.reshape(-1, inputs).astype(dtype)
    made = _linear((flat, weights, deferred), (), _options(dtype, deferred))
    return made.reshape(*x.shape[:-1], outputs)


def mlp(
    x: jax.Array,
    inner: jax.Array,
    outer: jax.Array,
    *,
    dtype,
    deferred: tuple[DeferredWeightGrad, DeferredWeightGrad] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`gelu(x @ inner) @ outer`.

    Args:
      x: `[..., width]`.
      inner, outer: float32 `[width, hidden]` and `[hidden, width]`.
      dtype, deferred, implementation: as of `linear`, for both matrices.

    Returns:
      As x, in `dtype`.

    Raises:
      ValueError: shapes that do not go together, or another implementation, naming them.
    """
    arguments.require_one_of("implementation", implementation, ("xla", None))
    width, hidden = _sides("inner", inner, x)
    arguments.require_shape("outer", outer, (hidden, width))
    if implementation == "xla" or not supports(math.prod(x.shape[:-1]), width, hidden, dtype):
        made = x.astype(dtype) @ inner.astype(dtype)
        return gelu.gelu(made, implementation) @ outer.astype(dtype)
    flat = x.reshape(-1, width).astype(dtype)
    return _mlp((flat, inner, outer, deferred), (), _options(dtype, deferred)).reshape(x.shape)


def _sides(name: str, matrix, x) -> tuple[int, int]:
    """Inputs and outputs of a matrix that multiplies the last axis of x."""
    inputs = jnp.shape(x)[-1] if jnp.ndim(x) else None
    if jnp.ndim(matrix) != 2 or matrix.shape[0] != inputs:
        raise ValueError(f"{name} is {list(jnp.shape(matrix))}: expected [{inputs}, outputs]")
    return matrix.shape


def _options(dtype, deferred) -> _Options:
    return _Options(jnp.dtype(dtype).name, deferred is not None, not targets.on_gpu())


def _linear_forward(given, _, options):
    x, weights, _ = given
    matrix = weights.astype(options.dtype)
    return matmul(x, matrix, interpret=options.interpret), matrix


def _linear_backward(given, _, matrix, d_out, options):
    x, *_ = given
    d_x = matmul(d_out, matrix, transpose_b=True, interpret=options.interpret)
    return d_x, *_weight_grad(x, d_out, options)


def _linear_plain(given, _, options):
    x, weights, _ = given
    return x @ weights.astype(options.dtype)


# Of `((x, weights, deferred), (), options)`.
_linear = differentiable(
    lambda *given: _linear_forward(*given)[0],
    _linear_plain,
    gradient=(_linear_forward, _linear_backward),
)


def _mlp_run(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    (hidden,) = matmul_gelu(x, inner, slopes=False, interpret=options.interpret)
    return matmul(hidden, outer, interpret=options.interpret)


def _mlp_forward(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    hidden, slope = matmul_gelu(x, inner, slopes=True, interpret=options.interpret)
    out = matmul(hidden, outer, interpret=options.interpret)
    return out, (inner, outer, hidden, slope)


def _mlp_backward(given, _, kept, d_out, options):
    (x, *_), (inner, outer, hidden, slope) = given, kept
    d_made = matmul_mul(d_out, outer, slope, interpret=options.interpret)
    d_x = matmul(d_made, inner, transpose_b=True, interpret=options.interpret)
    d_inner, of_inner = _weight_grad(x, d_made, options)
    d_outer, of_outer = _weight_grad(hidden, d_out, options)
    return d_x, d_inner, d_outer, (of_inner, of_outer) if options.deferred else None


def _mlp_plain(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    made = jnp.matmul(x, inner, preferred_element_type=jnp.float32)
    return gelu.plain(made).astype(options.dtype) @ outer


# Of `((x, inner, outer, deferred), (), options)`.
_mlp = differentiable(_mlp_run, _mlp_plain, gradient=(_mlp_forward, _mlp_backward))


def _weight_grad(x, d_y, options: _Options):
    """The gradient of a matrix that made y of x, or its two sides: one of the two."""
    if options.deferred:
        return None, DeferredWeightGrad(x, d_y)
    pair = DeferredWeightGrad(x, d_y)
    return weight_grads([pair], interpret=options.interpret).sum((0, 1)), None
