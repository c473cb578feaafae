"""The tasks: sums and differences of decimal numbers, written least significant digit first.

123 + 456 = 579 is the text `321+654=975` and a newline. Numbers live on the device as arrays of
digits, so one code serves any length. What training draws is pure and runs inside `jit`; what
scoring draws, `sample_exact` and `sample_kind`, are arrays of the host, so that nothing is compiled
for each length. A key draws the same whatever JAX's default integers, floats and keys are. Below
the array functions stand their twins in plain Python, on integers and strings, that tests hold the
first against.

Beside addition there are the addition of three numbers and subtraction, `321-12=003`, where the
first number is never the smaller one and the answer has as many digits as it has.
"""

import functools
import math
import operator
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax import jax_settings
from spak_jax.config import MAX_DIGITS, OPERANDS, Data

# Where Python would refuse to read or write longer ones.
sys.set_int_max_str_digits(max(MAX_DIGITS + 1, sys.get_int_max_str_digits()))

# The task's operator, `+` or `-`, is one token.
VOCABULARY = "\n+0123456789="
NEWLINE, OPERATOR, ZERO, EQUALS = (VOCABULARY.index(symbol) for symbol in "\n+0=")
VOCABULARY_SIZE = len(VOCABULARY)

# The shortest problem is `0+0=0` and its newline.
SHORTEST_TEXT = 6

# The seed's columns: the longer operand's number of digits, from and to, both included.
SEED_COLUMNS = {"1-4": (1, 4), "5-6": (5, 7), "8": (8, 9), "10": (10, 11), "12": (12, 12)}
SEED_COLUMN_DIGITS = 12

# Digits that one program draws at least.
LEAST_DRAWN = 2**14

# Additions that chance leaves out, or that try one thing: `sample_kind`.
KINDS = ("nines", "all-carry", "no-carry", "lopsided")


class Problems(NamedTuple):
    """Problems as digits, least significant first, zeros above a number's length.

    numbers: uint8 `[..., operands, digits]`. lengths: int32 `[..., operands]`, at least 1; no
    leading zeros.
    """

    numbers: jax.Array
    lengths: jax.Array

    @property
    def count(self) -> int:
        return self.numbers.shape[0]

    @property
    def digits(self) -> int:
        return self.numbers.shape[-1]


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
    drawn = jax.random.randint(length_key, at_most.shape, 1, at_most + 1, dtype=jnp.int32)
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
    bridge_key, longest_key, *keys = jax.random.split(key, 2 + OPERANDS[data.task])
    bridge = jax.random.bernoulli(bridge_key, jnp.float32(data.bridge_fraction), shape)
    bridges = jnp.array(data.bridge_digits, jnp.int32)
    longest = bridges[jax.random.randint(longest_key, shape, 0, bridges.size, dtype=jnp.int32)]
    at_most = jnp.where(bridge, longest, data.max_digits)
    return _problems(data.task, [sample_operands(key, at_most, data.longest) for key in keys])


def sample_exact(key: jax.Array, digits: int, count: int, task: str = "addition") -> Problems:
    """`count` problems whose operands all have exactly `digits` digits, uniformly drawn: arrays of
    the host."""
    lowest = 0 if digits == 1 else 1

    def operand(key):
        rest_key, first_key = jax.random.split(key)
        rest = _uniform_digits(rest_key, 0, (count, digits - 1))
        first = _uniform_digits(first_key, lowest, (count, 1))
        return np.concatenate([rest, first], axis=1), np.full(count, digits, np.int32)

    operands = [operand(key) for key in jax.random.split(key, OPERANDS[task])]
    return _problems(task, operands, np)


def sample_kind(random: np.random.Generator, kind: str, digits: int, count: int) -> Problems:
    """`count` additions of one kind, the longer number of `digits` digits: arrays of the host.

    Args:
      random: draws them.
      kind: "nines", 99...9 + 1 and 1 + 99...9 in turns; "all-carry", where every place carries
        into the next; "no-carry", where none does; "lopsided", where the other number has at most
        3 digits; of the last three, both orders.
      digits: of the longer number; of both, for all-carry and no-carry.
      count: of problems.
    """
    shape, place = (count, digits), np.arange(digits)
    top, low = (place == digits - 1) & (digits > 1), place == 0
    if kind == "nines":
        a, b = np.full(shape, 9), np.broadcast_to(low, shape)
    elif kind == "lopsided":
        a, b = random.integers(np.broadcast_to(top, shape), 10), random.integers(0, 10, shape)
        b = np.where(place < random.integers(1, min(3, digits) + 1, (count, 1)), b, 0)
    elif kind == "all-carry":
        # At the lowest place nothing comes in, and 0 + 9 would not do.
        a = random.integers(np.broadcast_to(top | low, shape), 10)
        b = random.integers(np.maximum(9 - a + low, top), 10)
    elif kind == "no-carry":
        a = random.integers(np.broadcast_to(top, shape), np.where(top, 9, 10))
        b = random.integers(np.broadcast_to(top, shape), 10 - a)
    else:
        raise ValueError(f"kind = {kind!r}: one of {KINDS}")
    swap = (np.arange(count) % 2 == 1)[:, None]
    numbers = np.stack([np.where(swap, b, a), np.where(swap, a, b)], -2).astype(np.uint8)
    lengths = np.maximum(1, np.where(numbers > 0, place + 1, 0).max(-1)).astype(np.int32)
    return Problems(numbers, lengths)


def widened(problems: Problems, digits: int) -> Problems:
    """Host arrays for `digits` digits, with zeros above, or without so many: programs are compiled
    for their width."""
    numbers = np.asarray(problems.numbers)[..., :digits]
    numbers = np.pad(numbers, [(0, 0)] * 2 + [(0, digits - numbers.shape[-1])])
    return Problems(numbers, np.asarray(problems.lengths))


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample_seed_columns(key: jax.Array, count: int, task: str = "addition") -> Problems:
    """`count` problems of the seed's zero-shot law: operands of at most 12 digits."""
    at_most = jnp.full(count, SEED_COLUMN_DIGITS, jnp.int32)
    keys = jax.random.split(key, OPERANDS[task])
    return _problems(task, [sample_operands(key, at_most, SEED_COLUMN_DIGITS) for key in keys])


def fixed_supply(data: Data) -> tuple[Problems, Problems]:
    """The problems of a fixed training set and the held-out ones, drawn once from `data.seed`.

    Nine tenths of what is drawn trains (`data.examples`), one tenth validates, as in the original.
    """
    held_out = data.examples // 9
    drawn = sample_law(jax_settings.key(data.seed), data, (data.examples + held_out,))
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
        count = supply.count
        start = jax.random.randint(key, (rows, 1), 0, count, dtype=jnp.int32)
        problems = jax.tree.map(
            lambda array: array[(start + jnp.arange(problems_a_row)) % count], supply
        )
    if packed:
        return _shift(*_pack(problems, data.row_length + 1, data.task))
    one_a_row = jax.tree.map(lambda array: array[:, 0], problems)
    return problem_rows(one_a_row, data.row_length, data.task)


def problem_rows(problems: Problems, length: int, task: str = "addition") -> Batch:
    """One problem a row, then newlines that no loss or score counts: a `[count, length]` batch."""
    return _shift(*render(problems, length + 1, task))


def answers(problems: Problems, task: str = "addition"):
    """The sums, or differences: uint8 digits `[..., digits + 1]` and int32 lengths `[...]`."""
    places, carried = _places_and_carries(problems, task)
    pad = [(0, 0)] * (places.ndim - 1)
    total = jnp.pad(places, [*pad, (0, 1)]) + jnp.pad(carried, [*pad, (1, 0)])
    total = (total % 10).astype(jnp.uint8)
    return total, problems.lengths[..., 0] if task == "subtraction" else _length(total)


def carries(problems: Problems, task: str = "addition"):
    """The number of places that carry into the next, or borrow from it, int32 `[...]`.

    Place by place: on arrays of the host nothing is compiled.
    """
    places = _places(problems, task)
    carry, count = 0, np.int32(0)
    for place in range(places.shape[-1]):
        carry = (places[..., place] + carry) // 10
        count = count + (carry != 0).astype(np.int32)
    return count


def longest_operand(problems: Problems) -> jax.Array:
    """The number of digits of the longest operand, int32 `[...]`."""
    return problems.lengths.max(-1)


def text_length(digits: int, task: str = "addition") -> int:
    """Tokens that the longest problem of `digits` digits takes, its newline included."""
    operands = OPERANDS[task]
    return (operands + 1) * digits + operands + 2


def render(problems: Problems, length: int, task: str = "addition"):
    """The text of each problem in a row of its own, cut or filled with newlines to `length`.

    Returns:
      int32 token ids and the bool mask of answer tokens (digits of the answer and the first newline
      after them), both `[..., length]`.
    """
    total, total_length = answers(problems, task)
    numbers = [*jnp.moveaxis(problems.numbers, -2, 0), total]
    lengths = [*jnp.moveaxis(problems.lengths, -1, 0), total_length]
    closing = [OPERATOR] * (len(numbers) - 2) + [EQUALS, NEWLINE]
    t = jnp.arange(length)
    tokens = jnp.full((*total_length.shape, length), NEWLINE, jnp.int32)
    start = jnp.zeros((*total_length.shape, 1), jnp.int32)
    for number, number_length, symbol in zip(numbers, lengths, closing, strict=True):
        end = start + number_length[..., None]
        place = jnp.clip(t - start, 0, number.shape[-1] - 1)
        digit = ZERO + jnp.take_along_axis(number, place, axis=-1).astype(jnp.int32)
        tokens = jnp.where((start <= t) & (t < end), digit, tokens)
        tokens = jnp.where(t == end, symbol, tokens)
        answer = (start <= t) & (t <= end)
        start = end + 1
    return tokens, answer


def coupled_ids(tokens: jax.Array) -> jax.Array:
    """Ids that tell which digits belong together (position coupling, Cho et al. 2024).

    Digits of equal significance share an id, of operands and answer alike, 2, 3, 4 ... from the
    least; `=`, which chooses the first digit of the answer, has 1, as each digit has one less than
    the next. The operator and newlines have none, 0.

    Args:
      tokens: int32 `[..., length]`, one problem a row.

    Returns:
      int32 `[..., length]`.
    """
    t = jnp.arange(tokens.shape[-1])
    digit = (tokens >= ZERO) & (tokens < EQUALS)
    before = jax.lax.cummax(jnp.where(digit, -1, t), axis=tokens.ndim - 1)
    return jnp.where(digit, t - before + 1, jnp.where(tokens == EQUALS, 1, 0)).astype(jnp.int32)


def from_equals_on(tokens: jax.Array) -> jax.Array:
    """Where an answer is being written: from each `=` up to its newline, bool `[..., length]`."""
    t = jnp.arange(tokens.shape[-1])
    last = lambda symbol: jax.lax.cummax(  # noqa: E731
        jnp.where(tokens == symbol, t, -1), axis=tokens.ndim - 1
    )
    return last(EQUALS) > last(NEWLINE)


def ended(tokens: jax.Array) -> jax.Array:
    """Where a row's first problem is over, from its newline on, bool `[..., length]`."""
    return jax.lax.cummax((tokens == NEWLINE).astype(jnp.int32), axis=tokens.ndim - 1) > 0


def _length(number: jax.Array) -> jax.Array:
    place = jnp.arange(1, number.shape[-1] + 1)
    return jnp.maximum(1, jnp.where(number > 0, place, 0).max(-1)).astype(jnp.int32)


def _uniform_digits(key: jax.Array, lowest: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 digits from `lowest` to 9, as `jax.random.randint` gives them for the shape.

    With partitionable keys a number depends on its place in the flat array alone: the start of a
    longer one is the shorter one, and a program for each power of two serves all shapes.
    """
    size = math.prod(shape)
    with jax.threefry_partitionable(True):
        drawn = _flat_digits(key, lowest, max(LEAST_DRAWN, 1 << (size - 1).bit_length()))
    return np.asarray(drawn)[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=2)
def _flat_digits(key: jax.Array, lowest: jax.Array | int, size: int) -> jax.Array:
    return jax.random.randint(key, (size,), lowest, 10, dtype=jnp.uint8)


def _problems(task: str, operands, xp=jnp):
    """Problems of numbers and lengths, as `sample_operands` gives them; the larger first if need
    be. `xp`: the module of the arrays, jnp or np."""
    numbers = xp.stack([number for number, _ in operands], -2)
    lengths = xp.stack([length for _, length in operands], -1)
    if task == "subtraction":
        a, b = numbers[..., 0, :], numbers[..., 1, :]
        # The highest place where they differ decides.
        highest = xp.where(a != b, xp.arange(1, a.shape[-1] + 1), 0).argmax(-1)[..., None]
        smaller = xp.take_along_axis(a, highest, -1) < xp.take_along_axis(b, highest, -1)
        numbers = xp.where(smaller[..., None], numbers[..., ::-1, :], numbers)
        lengths = xp.where(smaller, lengths[..., ::-1], lengths)
    return Problems(numbers, lengths)


def _places(problems: Problems, task: str):
    """Of each place the operands' digits added up, or subtracted: int32 `[..., digits]`."""
    signs = np.array([1, -1] if task == "subtraction" else [1] * OPERANDS[task], np.int32)
    return (problems.numbers.astype(np.int32) * signs[:, None]).sum(-2, dtype=np.int32)


def _places_and_carries(problems: Problems, task: str):
    """`_places`, and what each carries into the next: int32 `[..., digits]`."""
    places = _places(problems, task)
    least = -1 if task == "subtraction" else 0
    # Carry look-ahead: a place is a map from what comes in to what goes out, maps of neighbours
    # make the map of both.
    come_in = least + jnp.arange(OPERANDS[task])
    maps = jnp.floor_divide(places[..., None] + come_in, 10) - least

    def join(low, high):
        return jnp.take_along_axis(high, low, axis=-1)

    maps = jax.lax.associative_scan(join, maps, axis=maps.ndim - 2)
    return places, maps[..., -least] + least


def _pack(problems: Problems, length: int, task: str):
    """Texts one after another: problems `[rows, n]` to tokens and mask `[rows, length]`."""
    width = text_length(problems.digits, task)
    tokens, answer = render(problems, width, task)
    _, total_length = answers(problems, task)
    ends = jnp.cumsum(problems.lengths.sum(-1) + total_length + OPERANDS[task] + 1, axis=-1)
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


def symbol(task: str) -> str:
    """The task's operator."""
    return "-" if task == "subtraction" else "+"


def answer_of(numbers: Sequence[int], task: str = "addition") -> str:
    """The answer as people write it; differences with the digits of the first number."""
    if task == "subtraction":
        return str(operator.sub(*numbers)).zfill(len(str(numbers[0])))
    return str(sum(numbers))


def shown(numbers: Sequence[int], task: str = "addition") -> str:
    """`123+456`."""
    return symbol(task).join(map(str, numbers))


def problem_text(numbers: Sequence[int], task: str = "addition") -> str:
    """`321+654=975` and a newline for 123 and 456."""
    written = [str(number)[::-1] for number in numbers]
    return f"{symbol(task).join(written)}={answer_of(numbers, task)[::-1]}\n"


def prompt_text(numbers: Sequence[int], task: str = "addition") -> str:
    """`321+654=`, what a model is asked to go on from."""
    return problem_text(numbers, task).partition("=")[0] + "="


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises ValueError for a symbol outside the vocabulary."""
    return [VOCABULARY.index(symbol) for symbol in text.replace("-", "+")]


def decode(tokens: Sequence[int]) -> str:
    """The text of token ids, with `+` for the operator."""
    return "".join(VOCABULARY[token] for token in tokens)


def answer_mask(text: str) -> list[bool]:
    """Which symbols of a text of whole problems belong to an answer, newlines included."""
    mask, inside = [], False
    for letter in text:
        mask.append(inside)
        if letter in "=\n":
            inside = letter == "="
    return mask


def count_carries(numbers: Sequence[int], task: str = "addition") -> int:
    """How many places carry into the next, or borrow from it."""
    first, *others = ([int(digit) for digit in str(number)[::-1]] for number in numbers)
    sign, count, carry = -1 if task == "subtraction" else 1, 0, 0
    for place in range(max(map(len, (first, *others)))):
        here = lambda digits: digits[place] if place < len(digits) else 0  # noqa: B023, E731
        carry = (here(first) + sign * sum(map(here, others)) + carry) // 10
        count += carry != 0
    return count


def parse_problem(text: str, task: str = "addition") -> tuple[int, ...]:
    """The operands of `123+456` or `123+456=579`, written in ordinary digit order.

    Raises:
      ValueError: saying what is wrong with the text.
    """
    operands, sign = OPERANDS[task], re.escape(symbol(task))
    match = re.fullmatch(rf"([0-9]+(?:{sign}[0-9]+){{{operands - 1}}})(?:=([0-9]+))?", text)
    if not match:
        short = text if len(text) <= 40 else text[:37] + "..."
        example = symbol(task).join(("456", "123", "789")[:operands])
        raise ValueError(f"{short!r} is not a problem such as {example}")
    written, answer = match[1].split(symbol(task)), match[2]
    for number in written:
        if len(number) > MAX_DIGITS:
            raise ValueError(f"a number of {len(number)} digits: at most {MAX_DIGITS}")
        if len(number) > 1 and number[0] == "0":
            raise ValueError(f"{number} has a leading zero: the models never write one")
    numbers = tuple(map(int, written))
    if task == "subtraction" and numbers[0] < numbers[1]:
        raise ValueError(f"{match[1]}: the first number must not be the smaller one")
    right = answer_of(numbers, task)
    if answer is not None and answer != right:
        raise ValueError(f"{match[1]}={answer} is wrong: it is {right}")
    return numbers


def problems_from_integers(problems: Sequence[Sequence[int]]) -> Problems:
    """Host arrays for operands, non-negative integers, wide enough for the longest."""
    digits = max(len(str(number)) for numbers in problems for number in numbers)
    number = lambda n: [int(d) for d in reversed(f"{n:0{digits}d}")]  # noqa: E731
    return Problems(
        np.array([list(map(number, numbers)) for numbers in problems], np.uint8),
        np.array([[len(str(n)) for n in numbers] for numbers in problems], np.int32),
    )
