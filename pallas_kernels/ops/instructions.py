"""Single instructions of the chip that Triton does not choose by itself, and matrix products.

Interpreted, each is the plain operation that it stands for.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)


def made_in_place(x: jax.Array) -> jax.Array:
    """x, and what is computed from it is computed where it was loaded.

    What is computed from loads alone Triton computes in the layout of a matrix product's operand
    (its pass RemoveLayoutConversions): every warp would turn all the keys, with tables brought
    there through shared memory. What depends on an index, here in vain, it leaves alone.
    """
    rows = x.shape[0]
    return jnp.where((jnp.arange(rows) < rows)[:, None], x, jnp.zeros((), x.dtype))


def multiply_add(a: jax.Array, b, c, interpret: bool) -> jax.Array:
    """`a * b + c`, b and c arrays or numbers. Triton makes two instructions of it, unless told."""
    if interpret:
        return a * b + c
    b, c = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), a.shape) for x in (b, c))
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def reciprocal(x: jax.Array, interpret: bool) -> jax.Array:
    """1 / x in one instruction, to one unit in the last place (PTX ISA)."""
    return 1 / x if interpret else _instruction("rcp.approx.ftz.f32 $0, $1;", x)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2 to the power x in one instruction: relative error 2^-22 (PTX ISA), 0 where it would
    be subnormal; the compiler's own takes five, for the sake of subnormal numbers."""
    return jnp.exp2(x) if interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


# Two numbers in one register, as PTX names them.
_PAIRS = {"bfloat16": "bf16x2", "float16": "f16x2"}


def finite(x: jax.Array, interpret: bool) -> jax.Array:
    """x, of 16 bits where it is compiled, with zeros for NaN and infinity.

    Two instructions a register: x times 0 is 0 or the NaN whose bits are all 1 but for the sign
    (PTX ISA), and these bits are taken out of x.
    """
    if interpret:
        return jnp.where(jnp.isfinite(x), x, 0)
    kind, x = _PAIRS[x.dtype.name], made_in_place(x)
    asm = (
        "{ .reg .b32 zero, lost; mov.b32 zero, 0;"
        f" fma.rn.{kind} lost, $1, zero, zero; not.b32 lost, lost; and.b32 $0, $1, lost; }}"
    )
    return _of_pairs(asm, x)


def poisoned(x: jax.Array, by: jax.Array, interpret: bool) -> jax.Array:
    """x, but NaN where `by` is not finite."""
    if interpret:
        return x + by * 0
    kind = _PAIRS[x.dtype.name]
    asm = f"{{ .reg .b32 zero; mov.b32 zero, 0; fma.rn.{kind} $0, $2, zero, $1; }}"
    return _of_pairs(asm, x, by)


def _of_pairs(asm: str, *arguments: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype)
    (result,) = plgpu.elementwise_inline_asm(
        asm,
        args=arguments,
        constraints=",".join(["=r"] + ["r"] * len(arguments)),
        pack=2,
        result_shape_dtypes=[like],
    )
    return result


def _instruction(asm: str, *arguments: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)
    constraints = ",".join(["=f"] + ["f"] * len(arguments))
    (result,) = plgpu.elementwise_inline_asm(
        asm, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[like]
    )
    return result


def dot(a: jax.Array, b: jax.Array, *, transpose_a=False, transpose_b=False) -> jax.Array:
    """A matrix product accumulated in float32; float32 operands are not rounded to tf32."""
    full = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    a, b = (a.T if transpose_a else a), (b.T if transpose_b else b)
    return jax.lax.dot(a, b, precision=full, preferred_element_type=jnp.float32)
