"""The loops of a block one after another: what its one launch must equal.

    state = state + steps[i] + attention(norm1(...)); state = state + mlp(norm2(state))

With `implementation="xla"` all of it is plain `jnp`, for rows of any length on any device; without,
each operation takes its own kernel, as in a training. Derivatives of the one launch are of these.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.ops import linear, reference
from pallas_kernels.ops.add_layer_norm import add_layer_norm
from pallas_kernels.ops.attention.api import attention
from pallas_kernels.ops.looped.halting import has_converged
from pallas_kernels.ops.rows import EPSILON


def loop_by_loop(given, _, chosen, implementation: str | None = None):
    """As `looped_block`, of `((x, weights, positions, ids, thresholds), (), (options, dtype, block
    sizes))`."""
    x, weights, positions, ids, thresholds = given
    options, dtype, _ = chosen
    (batch, length, width), heads = x.shape, options.attention
    products = {"dtype": dtype, "implementation": implementation}
    linear_of = functools.partial(linear.linear, **products)
    norm_of = functools.partial(
        add_layer_norm, dtype=jnp.dtype(dtype), implementation=implementation
    )

    def mlp(normed):
        if weights.mlp_value is None:
            return linear.mlp(normed, weights.mlp_in, weights.mlp_out, **products)
        gate = jax.nn.silu(linear_of(normed, weights.mlp_in))
        return linear_of(gate * linear_of(normed, weights.mlp_value), weights.mlp_out)

    def one_loop(state, shift):
        if options.normalized:
            state = reference.layer_norm(state, 1.0, EPSILON)
        state = state + x if options.injected else state
        state, normed = norm_of(state, None, weights.norm1, shift=shift)
        mixed = attention(
            linear_of(normed, weights.qkv).reshape(
                batch, length, 3, options.heads, width // options.heads
            ),
            positions=positions,
            ids=ids,
            bias_table=weights.bias_table,
            window=heads.clip if heads.windowed else None,
            implementation=implementation,
        )
        mixed = linear_of(mixed.reshape(batch, length, width), weights.attention_out)
        state, normed = norm_of(state, mixed, weights.norm2)
        return state + mlp(normed)

    def readout(state):
        normed = reference.layer_norm(state, weights.final_norm, EPSILON).astype(dtype)
        head = weights.head.astype(dtype)
        return jnp.einsum("...d,vd->...v", normed, head, preferred_element_type=jnp.float32)

    def step(carry, shift):
        state, halted, steps = carry
        new = jnp.where(halted[..., None], state, one_loop(state, shift))
        if options.rule == "confidence":
            halts = jax.nn.softmax(readout(new)).max(-1) >= thresholds
        elif options.rule == "convergence":
            moved, size = ((v * v).sum(-1) for v in (new - state, new))
            settled = has_converged(moved, size, thresholds)
            halts = jax.lax.cummin(settled.astype(jnp.int32), axis=1) > 0
        else:
            halts = halted
        return (new, halted | halts, steps + ~halted), None

    index = jnp.minimum(jnp.arange(options.loops), len(weights.steps) - 1)
    nothing = jnp.zeros((batch, length), bool)
    first = x, nothing, nothing.astype(jnp.int32)
    (state, _, steps), _ = jax.lax.scan(step, first, weights.steps[index])
    return readout(state), steps
