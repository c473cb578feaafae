"""The task: adding decimal numbers that are written least significant digit first.

123 + 456 = 579 is the text `321+654=975` and a newline. Numbers live on the device as arrays of
digits, so one code serves any length; everything that takes a PRNG key is pure and runs inside
`jit`. Below the array functions stand their twins in plain Python, on integers and strings, that
tests hold the first against.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.config import MAX_DIGITS, Data

VOCABULARY = "\n+0123456789="
NEWLINE, PLUS, ZERO, EQUALS = (VOCABULARY.index(symbol) for symbol in "\n+0=")
VOCABULARY_SIZE = len(VOCABULARY)

# The shortest problem is `0+0=0` and its newline.
SHORTEST_TEXT = 6

# The seed's columns: the longer operand's number of digits, from and to, both included.
SEED_COLUMNS = {"1-4": (1, 4), "5-6": (5, 7), "8": (8, 9), "10": (10, 11), "12": (12, 12)}
SEED_COLUMN_DIGITS = 12


class Problems(NamedTuple):
    """Additions as digits, least significant first, zeros above a number's length.

    a, b: uint8 `[..., digits]`. a_length, b_length: int32 `[...]`, at least 1; no leading zeros.
    """

    a: jax.Array
    a_length: jax.Array
    b: jax.Array
    b_length: jax.Array


class Batch(NamedTuple):
    """Next-token prediction: int32 tokens and targets, bool answer mask, all `[batch, length]`.

    `answer[i, t]` is set where the target belongs to an answer: its digits and its newline.
    """

    tokens: jax.Array
    targets: jax.Array
    answer: jax.Array


def sample_operands(key: jax.Array, at_most: jax.Array, digits: int):
    """Operands of at most `at_most` digits: first a length, uniform, then a number, uniform.

    Args:
      key: PRNG key.
      at_most: int `[...]`, from 1 to `digits`.
      digits: size of the digit axis.

    Returns:
      uint8 digits `[..., digits]` and int32 lengths `[...]` without leading zeros.
    """
    length_key, digit_key = jax.random.split(key)
    drawn = jax.random.randint(length_key, at_most.shape, 1, at_most + 1)
    place = jnp.arange(digits)
    # Uniform digits make a uniform number below 10 ** drawn.
    number = jax.random.randint(digit_key, (*at_most.shape, digits), 0, 10, dtype=jnp.uint8)
    number = jnp.where(place < drawn[..., None], number, 0).astype(jnp.uint8)
    return number, _length(number)


def sample_law(key: jax.Array, data: Data, shape: tuple[int, ...]) -> Problems:
    """Problems by the training law: short operands, and now and then longer "bridge" ones.

    Args:
      key: PRNG key.
      data: the law's parameters.
      shape: of the problems.

    Returns:
      Problems with `data.longest` digits.
    """
    bridge_key, longest_key, a_key, b_key = jax.random.split(key, 4)
    bridge = jax.random.bernoulli(bridge_key, data.bridge_fraction, shape)
    longest = jax.random.choice(longest_key, jnp.array(data.bridge_digits), shape)
    at_most = jnp.where(bridge, longest, data.max_digits)
    return Problems(
        *sample_operands(a_key, at_most, data.longest),
        *sample_operands(b_key, at_most, data.longest),
    )


def sample_exact(key: jax.Array, digits: int, count: int) -> Problems:
    """`count` problems whose operands both have exactly `digits` digits, uniformly drawn."""
    lowest = 0 if digits == 1 else 1

    def operand(key):
        rest_key, first_key = jax.random.split(key)
        rest = jax.random.randint(rest_key, (count, digits - 1), 0, 10, dtype=jnp.uint8)
        first = jax.random.randint(first_key, (count, 1), lowest, 10, dtype=jnp.uint8)
        return jnp.concatenate([rest, first], axis=1), jnp.full(count, digits, jnp.int32)

    a_key, b_key = jax.random.split(key)
    return Problems(*operand(a_key), *operand(b_key))


def sample_seed_columns(key: jax.Array, count: int) -> Problems:
    """`count` problems of the seed's zero-shot law: both operands of at most 12 digits."""
    a_key, b_key = jax.random.split(key)
    at_most = jnp.full(count, SEED_COLUMN_DIGITS)
    return Problems(
        *sample_operands(a_key, at_most, SEED_COLUMN_DIGITS),
        *sample_operands(b_key, at_most, SEED_COLUMN_DIGITS),
    )


def fixed_supply(data: Data) -> tuple[Problems, Problems]:
    """The problems of a fixed training set and the held-out ones, drawn once from `data.seed`.

    Nine tenths of what is drawn trains (`data.examples`), one tenth validates, as in the original.
    """
    held_out = data.examples // 9
    drawn = sample_law(jax.random.key(data.seed), data, (data.examples + held_out,))
    split = lambda start, stop: jax.tree.map(lambda array: array[start:stop], drawn)  # noqa: E731
    return split(0, data.examples), split(data.examples, None)


def training_batch(key: jax.Array, data: Data, rows: int, supply: Problems | None) -> Batch:
    """Rows of training text, made from a key alone.

    Args:
      key: PRNG key of this batch.
      data: law and layout.
      rows: batch size.
      supply: a fixed set to take problems from; None draws fresh ones.

    Returns:
      A batch of `rows` rows of `data.row_length` tokens. Packed rows start at the start of a
      problem, uniformly chosen; those of a fixed set go on with the problems that follow it
      there. A problem that the end of a row cuts still counts as far as it goes.
    """
    packed = data.layout == "packed"
    problems_a_row = -(-(data.row_length + 1) // SHORTEST_TEXT) if packed else 1
    if supply is None:
        problems = sample_law(key, data, (rows, problems_a_row))
    else:
        count = supply.a.shape[0]
        start = jax.random.randint(key, (rows, 1), 0, count)
        problems = jax.tree.map(
            lambda array: array[(start + jnp.arange(problems_a_row)) % count], supply
        )
    if packed:
        return _shift(*_pack(problems, data.row_length + 1))
    one_a_row = jax.tree.map(lambda array: array[:, 0], problems)
    return problem_rows(one_a_row, data.row_length)


def problem_rows(problems: Problems, length: int) -> Batch:
    """One problem a row, then newlines that no loss or score counts: a `[count, length]` batch."""
    return _shift(*render(problems, length + 1))


def add(problems: Problems):
    """The sums: uint8 digits `[..., digits + 1]` and int32 lengths `[...]`."""
    places = problems.a + problems.b
    # Carry look-ahead: position i passes a carry on if it makes one, or is 9 and receives one.
    makes, passes = places > 9, places == 9

    def join(low, high):
        return high[0] | (high[1] & low[0]), high[1] & low[1]

    carry_out, _ = jax.lax.associative_scan(join, (makes, passes), axis=-1)
    pad = [(0, 0)] * (places.ndim - 1)
    total = jnp.pad(places, [*pad, (0, 1)]) + jnp.pad(carry_out, [*pad, (1, 0)])
    total = (total % 10).astype(jnp.uint8)
    return total, _length(total)


def carries(problems: Problems) -> jax.Array:
    """The number of places that carry into the next, int32 `[...]`."""
    total, _ = add(problems)
    received = total[..., :-1] != (problems.a + problems.b) % 10
    # The top place carries where the sum is longer than the digit axis.
    return (received.sum(-1) + (total[..., -1] > 0)).astype(jnp.int32)


def longer_operand(problems: Problems) -> jax.Array:
    """The number of digits of the longer operand, int32 `[...]`."""
    return jnp.maximum(problems.a_length, problems.b_length)


def text_length(digits: int) -> int:
    """Tokens that the longest problem of `digits` digits takes, its newline included."""
    return 3 * digits + 4


def render(problems: Problems, length: int):
    """The text of each problem in a row of its own, cut or filled with newlines to `length`.

    Returns:
      int32 token ids and the bool mask of answer tokens (digits of the sum and the first newline
      after them), both `[..., length]`.
    """
    total, total_length = add(problems)
    t = jnp.arange(length)
    plus = problems.a_length[..., None]
    equals = plus + 1 + problems.b_length[..., None]
    newline = equals + 1 + total_length[..., None]

    def digits(number, start):
        place = jnp.clip(t - start, 0, number.shape[-1] - 1)
        return ZERO + jnp.take_along_axis(number, place, axis=-1).astype(jnp.int32)

    tokens = jnp.select(
        [t < plus, t == plus, t < equals, t == equals, t < newline],
        [
            digits(problems.a, jnp.zeros_like(plus)),
            jnp.int32(PLUS),
            digits(problems.b, plus + 1),
            jnp.int32(EQUALS),
            digits(total, equals + 1),
        ],
        jnp.int32(NEWLINE),
    )
    return tokens, (t > equals) & (t <= newline)


def from_equals_on(tokens: jax.Array) -> jax.Array:
    """Where an answer is being written: from each `=` up to its newline, bool `[..., length]`."""
    t = jnp.arange(tokens.shape[-1])
    last = lambda symbol: jax.lax.cummax(  # noqa: E731
        jnp.where(tokens == symbol, t, -1), axis=tokens.ndim - 1
    )
    return last(EQUALS) > last(NEWLINE)


def _length(number: jax.Array) -> jax.Array:
    place = jnp.arange(1, number.shape[-1] + 1)
    return jnp.maximum(1, jnp.where(number > 0, place, 0).max(-1)).astype(jnp.int32)


def _pack(problems: Problems, length: int):
    """Texts one after another: problems `[rows, n]` to tokens and mask `[rows, length]`."""
    width = text_length(problems.a.shape[-1])
    tokens, answer = render(problems, width)
    _, total_length = add(problems)
    ends = jnp.cumsum(problems.a_length + problems.b_length + total_length + 3, axis=-1)
    t = jnp.arange(length)
    which = (t[None, :, None] >= ends[:, None, :]).sum(-1)
    starts = jnp.pad(ends, [(0, 0), (1, 0)])
    place = which * width + t - jnp.take_along_axis(starts, which, axis=1)

    def gather(array):
        return jnp.take_along_axis(array.reshape(array.shape[0], -1), place, axis=1)

    return gather(tokens), gather(answer)


def _shift(tokens: jax.Array, answer: jax.Array) -> Batch:
    return Batch(tokens[..., :-1], tokens[..., 1:], answer[..., 1:])


# The same in plain Python, and what reads and writes problems for people.


def problem_text(a: int, b: int) -> str:
    """`321+654=975` and a newline for 123 and 456."""
    return f"{str(a)[::-1]}+{str(b)[::-1]}={str(a + b)[::-1]}\n"


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises ValueError for a symbol outside the vocabulary."""
    return [VOCABULARY.index(symbol) for symbol in text]


def decode(tokens: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(VOCABULARY[token] for token in tokens)


def answer_mask(text: str) -> list[bool]:
    """Which symbols of a text of whole problems belong to an answer, newlines included."""
    mask, inside = [], False
    for symbol in text:
        mask.append(inside)
        if symbol in "=\n":
            inside = symbol == "="
    return mask


def count_carries(a: int, b: int) -> int:
    """How many places carry into the next: the digit sums that the sum is short of, over 9."""
    digit_sum = lambda number: sum(map(int, str(number)))  # noqa: E731
    return (digit_sum(a) + digit_sum(b) - digit_sum(a + b)) // 9


def parse_problem(text: str) -> tuple[int, int]:
    """The operands of `123+456` or `123+456=579`, written in ordinary digit order.

    Raises:
      ValueError: saying what is wrong with the text.
    """
    match = re.fullmatch(r"([0-9]+)\+([0-9]+)(?:=([0-9]+))?", text)
    if not match:
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(f"{shown!r} is not a problem such as 123+456 or 123+456=579")
    for number in match.groups(""):
        if len(number) > MAX_DIGITS + 1:
            raise ValueError(f"a number of {len(number)} digits: at most {MAX_DIGITS}")
        if len(number) > 1 and number[0] == "0":
            raise ValueError(f"{number} has a leading zero: the models never write one")
    a, b, answer = match.groups()
    if max(len(a), len(b)) > MAX_DIGITS:
        raise ValueError(f"a number of {max(len(a), len(b))} digits: at most {MAX_DIGITS}")
    if answer is not None and int(answer) != int(a) + int(b):
        raise ValueError(f"{a}+{b}={answer} is wrong: the sum is {int(a) + int(b)}")
    return int(a), int(b)


def problems_from_integers(pairs: Sequence[tuple[int, int]]) -> Problems:
    """Host arrays for pairs of non-negative integers, wide enough for the longest."""
    digits = max(len(str(number)) for pair in pairs for number in pair)
    number = lambda n: [int(d) for d in reversed(f"{n:0{digits}d}")]  # noqa: E731
    operand = lambda side: (  # noqa: E731
        np.array([number(pair[side]) for pair in pairs], np.uint8),
        np.array([len(str(pair[side])) for pair in pairs], np.int32),
    )
    return Problems(*operand(0), *operand(1))
