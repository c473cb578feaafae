"""How long a call of attention takes on the GPU at hand, measured so that contenders compare.

One compiled program makes many calls, each on its own keys and values, together more than the L2
cache holds: the data come from memory, and the host's cost of starting a program is spread thin.
Each call takes its queries from the output of the call before it, so that none runs beside another.
Contenders take turns within a round; the median over the rounds is their time.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tuning.shapes import Shape

# More than the L2 cache of an H100 or RTX 5070 holds.
BYTES_TOUCHED = 72 * 2**20
SECONDS_PER_PROGRAM = 0.01


class Inputs(NamedTuple):
    """What the calls of a program work on: one `q` and `d_out`, and keys and values a call."""

    q: jax.Array
    d_out: jax.Array
    keys: list[jax.Array]
    values: list[jax.Array]


class Program(NamedTuple):
    """`run` makes `calls` calls and returns when they are done."""

    run: Callable[[], None]
    calls: int


def bytes_moved(shape: Shape, item_size: int, *, backward: bool) -> int:
    """Bytes that a call moves at least: forward reads q, k, v and writes the output; backward reads
    q, k, v and the gradient of the output and writes three gradients."""
    tensor = shape.batch * shape.length * shape.heads * shape.head_dim * item_size
    return tensor * (11 if backward else 4)


def operations(shape: Shape, *, backward: bool) -> int:
    """Floating-point operations of the matrix products without what the causal mask cuts: two
    forward, five backward (Dao 2023, FlashAttention-2, section 4.1)."""
    product = 2 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return product * (7 if backward else 2) // 2


def call_count(shape: Shape, item_size: int) -> int:
    """Calls whose keys and values together overflow the cache; two at least."""
    tensor = shape.batch * shape.length * shape.heads * shape.head_dim * item_size
    return max(2, -(-BYTES_TOUCHED // (2 * tensor)))


def round_count(calls: int, seconds_a_call: float) -> int:
    """How often a program goes round its calls, given a guess of what one takes."""
    return max(1, round(SECONDS_PER_PROGRAM / (seconds_a_call * calls)))


def inputs(shape: Shape, dtype, calls: int) -> Inputs:
    """Random normal inputs for the calls of a program."""
    draw = jax.jit(lambda key: jax.random.normal(key, tuple(shape), dtype))
    arrays = [draw(key) for key in jax.random.split(jax.random.key(0), 2 * calls + 2)]
    return Inputs(arrays[0], arrays[1], arrays[2::2], arrays[3::2])


def program(
    step: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    first: jax.Array,
    given: Inputs,
    *,
    seconds_a_call: float,
) -> Program:
    """A compiled program that calls `step` on all keys and values, again and again.

    `step(x, k, v)` returns the next call's `x` and whatever else it must not leave out. `first` is
    the first call's. `seconds_a_call` is a guess, by which the program's length is chosen.
    """
    rounds = round_count(len(given.keys), seconds_a_call)

    def one_round(x, given):
        kept = []
        for k, v in zip(given.keys, given.values, strict=True):
            x, more = step(x, k, v)
            kept.append(more)
        return x, kept

    @jax.jit
    def repeated(x, given):
        # What is kept goes round the loop: none of it may be left out as unused. A first round
        # outside the loop would compile everything twice.
        nothing = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype),
            jax.eval_shape(one_round, x, given)[1],
        )
        return jax.lax.fori_loop(0, rounds, lambda _, last: one_round(last[0], given), (x, nothing))

    executable = repeated.lower(first, given).compile()
    run = lambda: jax.block_until_ready(executable(first, given))  # noqa: E731
    return Program(run, rounds * len(given.keys))


def forward_step(attention: Callable) -> Callable:
    """A step that calls `attention(q, k, v)`; its output is the next call's q."""
    return lambda q, k, v: (attention(q, k, v), ())


def gradient_step(attention: Callable, d_out: jax.Array) -> Callable:
    """As `forward_step`, and the gradients of q, k and v with it."""

    def step(q, k, v):
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    return step


def medians(programs: dict[str, Program], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Seconds a call of each program, taking turns: lower quartile, median, upper quartile."""
    seconds = {name: [] for name in programs}
    for name in programs:
        programs[name].run()
    for _ in range(rounds):
        for name, (run, calls) in programs.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: tuple(statistics.quantiles(values, n=4)) for name, values in seconds.items()}


def quartiles(
    programs: dict[str, Program], rounds: int, units_a_second: float
) -> dict[str, dict[str, float]]:
    """`medians` by name, `low`, `median` and `high`, in units such as milliseconds (1e3)."""
    return {
        name: dict(
            zip(("low", "median", "high"), (units_a_second * x for x in values), strict=True)
        )
        for name, values in medians(programs, rounds).items()
    }


def copy_speed() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the GPU at hand."""
    x = jnp.zeros(2**28, jnp.float32)
    plus_one = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best_of(lambda: plus_one(x))


def product_speed(dtype) -> float:
    """Floating-point operations a second of an 8192 x 8192 x 8192 product on the GPU at hand."""
    x = jax.random.normal(jax.random.key(0), (8192, 8192), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * 8192**3 / _best_of(lambda: product(x))


def _best_of(call, tries: int = 5, calls: int = 20) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)][-1])
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)
