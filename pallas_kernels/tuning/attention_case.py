"""Attention as a case: the kernels that a call takes, and its program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.ops.attention import api, flash, fused_row
from pallas_kernels.ops.attention.tile import AttentionInputs, Options, table_dtype


def kernels(case, target: str) -> tuple[str, ...]:
    """Names of its kernels on a target, forward first."""
    if case.kernel is not None:
        return (case.kernel,)
    whole_row = tiles.whole_row(
        target,
        "fused_row_forward",
        case.shape.length,
        case.shape.head_dim,
        case.item_size,
        biased=case.clip is not None,
    )
    taken = tiles.FUSED_ROW_KERNELS if whole_row else tiles.FLASH_KERNELS
    return taken if case.backward else taken[:1]


def asked(case) -> str:
    """What is asked for beside its main inputs, in words."""
    used = {
        "RoPE": case.rope,
        f"dropout {case.rate:g}": case.rate,
        "ids, bias, window": case.clip is not None,
    }
    return ", ".join(name for name, value in used.items() if value)


def program(case, target: str) -> tuple[Callable, tuple]:
    """A function of q, k, v, attention's inputs, log-sum-exp, delta and the output's gradient,
    and their shapes."""
    batch, length, heads, head_dim = case.shape
    options = Options(
        length=length,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        causal=True,
        rate=case.rate,
        clip=case.clip,
        windowed=case.clip is not None,
        target=target,
        interpret=False,
    )
    array = jax.ShapeDtypeStruct
    given = {}
    if case.rope:
        tables = array((1, length, head_dim // 2), table_dtype(case.dtype))
        given |= {"cos": tables, "sin": tables}
    if case.clip is not None:
        given["ids"] = array((batch, length), jnp.int32)
        given["bias"] = array((heads, 2 * case.clip + 2), jnp.float32)
    if case.rate:
        given["seed"] = array((2,), jnp.uint32)
    q = array(tuple(case.shape), case.dtype)
    scalars = array((batch, heads, length), jnp.float32)
    function = _whole(case, options) if case.kernel is None else _one_kernel(case, options)
    return function, (q, q, q, AttentionInputs(**given), scalars, scalars, q)


def alone(case, target: str, kernel: str):
    """The case of one of its kernels, with the settings that it has there."""
    return dataclasses.replace(case, kernel=kernel, settings=settings_of(target, case, kernel))


def settings_of(target: str, case, kernel: str) -> dict[str, Any]:
    """Arguments that launch one kernel of attention on a target; empty where there are none."""
    return tiles.settings(target, kernel, tile_key(target, case, kernel)) or {}


def tile_key(target: str, case, kernel: str) -> str:
    """Key of the table's line for one kernel of attention."""
    sizes = case.shape.head_dim, case.item_size
    if kernel in tiles.FLASH_KERNELS:
        return tiles.streamed_key(target, kernel, *sizes, with_ids=case.clip is not None)
    return tiles.key(kernel, case.shape.length, *sizes)


def _whole(case, options: Options) -> Callable:
    def forward(q, k, v, inputs, *_):
        given = (q, k, v), inputs.bias
        return api.run_kernels(given, inputs._replace(bias=None), options)

    def both(q, k, v, inputs, lse, delta, d_out):
        def attend(q, k, v, bias):
            return api.run_kernels(((q, k, v), bias), inputs._replace(bias=None), options)

        out, gradients = jax.vjp(attend, q, k, v, inputs.bias)
        return out, gradients(d_out)

    return both if case.backward else forward


def _one_kernel(case, options: Options) -> Callable:
    def run(q, k, v, inputs, lse, delta, d_out):
        if case.kernel == "fused_row_forward":
            return fused_row.forward((q, k, v), inputs, options, **case.settings)
        if case.kernel == "fused_row_backward":
            return fused_row.backward((q, k, v), inputs, lse, d_out, options, **case.settings)
        block_sizes = flash.BlockSizes(**case.settings)
        if case.kernel == "flash_forward":
            return flash.forward(q, k, v, inputs, options, block_sizes)
        kernel = flash.d_q_and_bias if case.kernel == "flash_d_q" else flash.d_kv
        return kernel(q, k, v, inputs, lse, delta, d_out, options, block_sizes)

    return run
