"""The exact GELU of bfloat16 and float16 numbers at the speed of memory, forward and backward.

`u * Phi(u)` with the normal distribution's Phi (Hendrycks and Gimpel 2016, Gaussian Error Linear
Units); only u is kept for the backward pass. XLA's own error function takes several times as long
as reading and writing the numbers does.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import arguments, targets
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops import instructions

NUMBERS_A_PROGRAM = 4096
NUM_WARPS = 4
# Abramowitz and Stegun 1964, 7.1.26: erf to 1.5e-7.
P = 0.3275911
A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def gelu(u: jax.Array, implementation: str | None = None) -> jax.Array:
    """GELU with the error function, not its tanh approximation.

    Args:
      u: bfloat16, float16 or float32, of any shape.
      implementation: "pallas" or "xla"; None takes the kernels on a GPU that they are for.

    Returns:
      As u, computed in float32 by the kernels, to 2e-7 times u.

    Raises:
      ValueError: u is of another dtype, or the implementation unknown.
    """
    arguments.require_dtype("u", u, *arguments.FLOATS)
    arguments.require_one_of("implementation", implementation, (*arguments.KERNELS_OR_PLAIN, None))
    if implementation is None:
        implementation = "pallas" if targets.kernels_run() else "xla"
    if implementation == "xla" or u.size == 0:
        return jax.nn.gelu(u, approximate=False)
    return run_kernels(u.reshape(-1), (), not targets.on_gpu()).reshape(u.shape)


def _run(u, _, interpret):
    return _call(_forward_kernel, "gelu_forward", interpret, u)


def _backward(u, _, kept, d_out, interpret):
    return _call(_backward_kernel, "gelu_backward", interpret, u, d_out)


def plain(u: jax.Array) -> jax.Array:
    """The same in plain `jnp`, computed in float32."""
    return jax.nn.gelu(u.astype(jnp.float32), approximate=False).astype(u.dtype)


# The kernels, of `(u, (), interpret)`, numbers in a row.
run_kernels = differentiable(
    _run, lambda u, *_: plain(u), gradient=(lambda *given: (_run(*given), ()), _backward)
)


def _call(kernel, name, interpret, *arrays):
    (count,) = arrays[0].shape
    block = pl.BlockSpec((NUMBERS_A_PROGRAM,), lambda i: (i,))
    return pl.pallas_call(
        functools.partial(kernel, count=count, interpret=interpret),
        grid=(pl.cdiv(count, NUMBERS_A_PROGRAM),),
        in_specs=[block] * len(arrays),
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*arrays)


def _forward_kernel(u_ref, out_ref, *, count, interpret):
    mask = _mask(count)
    u = _load(u_ref, mask)
    below, _ = normal(u, interpret)
    plgpu.store(_whole(out_ref), (u * below).astype(out_ref.dtype), mask=mask)


def _backward_kernel(u_ref, d_out_ref, d_u_ref, *, count, interpret):
    mask = _mask(count)
    u, d_out = _load(u_ref, mask), _load(d_out_ref, mask)
    below, bell = normal(u, interpret)
    d_u = d_out * slope(u, below, bell, interpret)
    plgpu.store(_whole(d_u_ref), d_u.astype(d_u_ref.dtype), mask=mask)


def normal(u, interpret):
    """The normal distribution's share below u, and exp(-u^2 / 2)."""
    bell = instructions.exp2(u * u * (-0.5 * instructions.LOG2_E), interpret)
    multiply_add = functools.partial(instructions.multiply_add, interpret=interpret)
    t = instructions.reciprocal(multiply_add(jnp.abs(u), P / math.sqrt(2), 1.0), interpret)
    series = 0.5 * A[-1]
    for a in reversed(A[:-1]):
        series = multiply_add(t, series, 0.5 * a)
    tail = series * t * bell
    return jnp.where(u < 0, tail, 1 - tail), bell


def slope(u, below, bell, interpret):
    """Of the GELU at u, given what `normal` makes of it."""
    return instructions.multiply_add(u * bell, 1 / math.sqrt(2 * math.pi), below, interpret)


def _whole(ref):
    return ref.at[pl.ds(0, NUMBERS_A_PROGRAM)]


def _load(ref, mask):
    other = None if mask is None else 0
    return plgpu.load(_whole(ref), mask=mask, other=other).astype(jnp.float32)


def _mask(count: int):
    if count % NUMBERS_A_PROGRAM == 0:
        return None
    return pl.program_id(0) * NUMBERS_A_PROGRAM + jnp.arange(NUMBERS_A_PROGRAM) < count
