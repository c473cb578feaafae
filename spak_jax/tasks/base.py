"""What a task is: problems drawn, written as tokens, read from people and shown to them.

A problem has one or more inputs, each a sequence of symbols, and an answer that follows from them.
Its text is the inputs with the operator between them, `=`, the answer and a newline:
`321+654=975`. On the device problems are arrays of symbols, so one code serves any length; for
people a problem is a tuple of strings, `("123", "456")`.

A model answers in one of three ways (`ANSWERS`). Symbol by symbol, each token predicts the next
one. In one pass, it reads `321+654=_____`, as many blanks as the longest answer and its newline
need, and each symbol is read out at its own blank. In place, where a problem's one input and its
answer are equally long, it reads `=1011` alone, and each symbol of the answer is read out at the
input's symbol of the same place: as word problems are posed to recurrent networks. The `=` says
where the input starts: without it nothing would tell the places of `1111` apart.

A task of one's own says which symbols there are and what the answer is, on arrays and in plain
Python; everything else has a default that it may replace:

    @TASKS.register("caesar")
    class Caesar(Task):
        symbols = "abcdefgh"

        def answers(self, problems):
            return (problems.inputs[..., 0, :] + 3) % 8, problems.lengths[..., 0]

        def solve(self, problem):
            return problem[0].translate(str.maketrans("abcdefgh", "defghabc"))
"""

import abc
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS

Written = TypeVar("Written", str, list)

# How answers are given; both of the last two come in one pass.
ANSWERS = ("symbol-by-symbol", "one-pass", "in-place")
# People see it where an answer at blanks goes.
BLANK = "_"
# Symbols that one program draws at least.
LEAST_DRAWN = 2**14


class Problems(NamedTuple):
    """Problems as symbols, in the order in which they are written, zeros behind an input's end.

    inputs: uint8 `[..., inputs, width]`, indices into the task's symbols. lengths: int32
    `[..., inputs]`, at least 1.
    """

    inputs: jax.Array
    lengths: jax.Array

    @property
    def count(self) -> int:
        return self.inputs.shape[0]

    @property
    def width(self) -> int:
        """Symbols that every input has room for."""
        return self.inputs.shape[-1]


class Raster(NamedTuple):
    """Rows that a sequence of symbols is cut into for pictures.

    columns: symbols of a row. colours: of symbols, as Matplotlib names them; a symbol without one
    is as white as paper.
    """

    columns: int
    colours: Mapping[str, str]


class Batch(NamedTuple):
    """What a model reads and what it is to say: int32 tokens and targets, bool answer mask, all
    `[batch, length]`.

    `answer[i, t]` is set where the target belongs to an answer: its symbols and its newline. Symbol
    by symbol the target is the next token; at blanks, what the blank stands for; in place, where
    answers have no newline, the answer's symbol of the same place.
    """

    tokens: jax.Array
    targets: jax.Array
    answer: jax.Array


class Task(abc.ABC):
    """One kind of problem.

    Args:
      answered: how, of `ANSWERS`.

    Raises:
      ValueError: it is none of these, or in place, where problems have several inputs or answers of
        another length than theirs.

    A task has no other state: all that is drawn comes from keys. Array functions are pure and run
    inside `jit`, but for those that scoring calls, `sample_exact` and `sample_kind`: they give
    arrays of the host, so that nothing is compiled for each length. A key draws the same whatever
    JAX's default integers, floats and keys are.
    """

    # The name it is registered by.
    name: ClassVar[str]
    # What inputs and answers consist of, a character each.
    symbols: ClassVar[str]
    # Inputs of a problem, and the character between two of them.
    inputs: ClassVar[int] = 1
    operator: ClassVar[str] = ""
    # What lengths count, for messages, tables and figures.
    unit: ClassVar[str] = "symbols"
    # Problems that chance leaves out, or that try one thing, by name: `sample_kind`.
    kinds: ClassVar[tuple[str, ...]] = ()
    # Whether position ids are those of a grid, `positions.base.grid_ids`.
    grid_ids: ClassVar[bool] = False
    # Columns of a published table, by name: lengths from and to, both included.
    published_columns: ClassVar[Mapping[str, tuple[int, int]]] = {}

    def __init__(self, answered: str = ANSWERS[0]):
        if answered not in ANSWERS:
            raise ValueError(f"answered = {answered!r}: one of {', '.join(ANSWERS)}")
        if answered == "in-place":
            asked, answer = self.input_length(7), self.answer_length(7)
            if self.inputs > 1 or asked != answer:
                raise ValueError(
                    f"answered = 'in-place': {self.name} has {self.inputs} inputs of {asked}"
                    f" symbols and an answer of {answer}, where one of each of the same length is"
                    " needed"
                )
        self.answered = answered

    @property
    def one_pass(self) -> bool:
        """Whether all symbols of an answer are read out at once, at blanks or in place."""
        return self.answered != "symbol-by-symbol"

    @property
    def in_place(self) -> bool:
        return self.answered == "in-place"

    # ---- What every task must say. ----

    @abc.abstractmethod
    def answers(self, problems: Problems) -> tuple[jax.Array, jax.Array]:
        """The right answers: uint8 symbols `[..., width]`, and int32 lengths `[...]`.

        The width is at least that of the longest answer.
        """

    @abc.abstractmethod
    def solve(self, problem: tuple[str, ...]) -> str:
        """The right answer in plain Python: the truth that `answers` is tested against."""

    # ---- What a task may say otherwise: sizes. ----

    def input_length(self, length: int) -> int:
        """Symbols of an input of a problem of a length, an int or an array of them."""
        return length

    def size_of(self, symbols: int) -> int:
        """The length of a problem whose longest input has so many symbols, an int or an array of
        them: the inverse of `input_length`."""
        return symbols

    def answer_length(self, length: int) -> int:
        """Symbols of the longest answer to a problem of a length, an int or an array of them."""
        return self.input_length(length)

    def lengths(self, problems: Problems) -> jax.Array:
        """The size of each problem, int32 `[...]`."""
        return self.size_of(problems.lengths.max(-1))

    def measures(self, problems: Problems) -> dict[str, jax.Array]:
        """What else scores are grouped by, each int32 `[...]`, by name."""
        return {}

    @property
    def depth_unit(self) -> str:
        """What depths count, for messages, tables and figures."""
        return self.unit

    def depths(self, problems: Problems) -> jax.Array:
        """The depth that each problem needs, int32 `[...]`, of arrays of the device or of the host:
        how many steps a model takes, at least, that passes information on by one place a step.

        As a rule `lengths`: the answer's last symbol hangs on the first one of the problem.
        """
        return self.lengths(problems)

    def text_length(self, length: int) -> int:
        """Tokens that the longest problem of a length takes, its newline included."""
        return self.inputs * (self.input_length(length) + 1) + 1 + self.answer_length(length)

    @property
    def shortest_text(self) -> int:
        """Tokens of the shortest problem."""
        return 2 * self.inputs + 2

    # ---- What is drawn. ----

    def sample(self, keys: jax.Array, at_most: jax.Array, width: int) -> Problems:
        """Problems for training: of every input first the length, uniform, then the symbols.

        Args:
          keys: PRNG keys, one an input.
          at_most: int32 `[...]`, the longest that each problem may be.
          width: the length that the arrays have room for, at least every `at_most`.
        """
        return self._stack([self.sample_input(key, at_most, width) for key in keys])

    def sample_exact(self, key: jax.Array, length: int, count: int) -> Problems:
        """`count` problems whose inputs all have exactly a length: arrays of the host."""
        keys = jax.random.split(key, self.inputs)
        lengths = np.full(count, length, np.int32)
        return self._stack([(self.exact_input(key, length, count), lengths) for key in keys], np)

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one of `kinds`, of a length: arrays of the host."""
        raise ValueError(f"kind = {kind!r}: one of {self.kinds}")

    def kind_count(self, kind: str, count: int) -> int:
        """How many problems of a kind are scored where there are `count` plain ones."""
        return -(-count // 10)

    def sample_input(
        self, key: jax.Array, at_most: jax.Array, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """One input of each problem, as `sample` draws it.

        Returns:
          uint8 `[..., input_length(width)]`, and how many symbols count, int32 `[...]`.
        """
        length_key, symbol_key = jax.random.split(key)
        drawn = jax.random.randint(length_key, at_most.shape, 1, at_most + 1, dtype=jnp.int32)
        shape, base = (*at_most.shape, width), len(self.symbols)
        symbols = jax.random.randint(symbol_key, shape, 0, base, dtype=jnp.uint8)
        return jnp.where(jnp.arange(width) < drawn[..., None], symbols, 0).astype(jnp.uint8), drawn

    def exact_input(self, key: jax.Array, length: int, count: int) -> np.ndarray:
        """One input of each problem of exactly a length, uint8 `[count, length]`, on the host."""
        return uniform_symbols(key, 0, len(self.symbols), (count, length))

    def arrange(self, inputs, lengths, xp=jnp) -> Problems:
        """Problems of inputs as they were drawn, in the order that the task asks for.

        Args:
          inputs, lengths: as of `Problems`.
          xp: the module of the arrays, `jnp` or `np`.
        """
        return Problems(inputs, lengths)

    # ---- What a model reads. ----

    @functools.cached_property
    def vocabulary(self) -> str:
        """A character for each token: newline, operator, symbols, `=` and, where it is read, the
        blank."""
        blank = BLANK * (self.answered == "one-pass")
        return f"\n{self.operator}{self.symbols}={blank}"

    @property
    def end(self) -> int:
        """The newline: it ends a problem, and fills rows up."""
        return 0

    @property
    def equals(self) -> int:
        """The token behind which the answer stands."""
        return self.first_symbol + len(self.symbols)

    @property
    def blank(self) -> int:
        """The token that stands where an answer goes that is read out at blanks."""
        return self.equals + 1

    @property
    def first_symbol(self) -> int:
        """The token of the first of `symbols`; the others follow."""
        return 1 + len(self.operator)

    def is_symbol(self, tokens: jax.Array) -> jax.Array:
        """Which tokens are symbols, or blanks that stand for some: bool, as the tokens."""
        return (tokens >= self.first_symbol) & (tokens != self.equals)

    def position_ids(self, tokens: jax.Array) -> jax.Array | None:
        """Ids that say which tokens belong together, int32 `[..., length]`, 0 for no place.

        None where the task has none to give.

        Args:
          tokens: int32 `[..., length]`, one problem a row.
        """
        return None

    def aligned_ids(self, tokens: jax.Array) -> jax.Array:
        """Position ids that count each run of symbols from 2 on, so that those of equal place in
        inputs and answer share one (position coupling, Cho et al. 2024). `=`, which comes before
        the answer's first symbol, has 1; other tokens have no place, 0.

        Args, returns: as of `position_ids`.
        """
        symbol, t = self.is_symbol(tokens), jnp.arange(tokens.shape[-1])
        before = jax.lax.cummax(jnp.where(symbol, -1, t), axis=tokens.ndim - 1)
        others = jnp.where(tokens == self.equals, 1, 0)
        return jnp.where(symbol, t - before + 1, others).astype(jnp.int32)

    def render(self, problems: Problems, length: int) -> tuple[jax.Array, jax.Array]:
        """The text of each problem in a row of its own, cut or filled with newlines to `length`.

        Returns:
          int32 tokens and the bool mask of answer tokens (the answer and the first newline behind
          it), both `[..., length]`.
        """
        answer, answer_length = self.answers(problems)
        parts = [*jnp.moveaxis(problems.inputs, -2, 0), answer]
        lengths = [*jnp.moveaxis(problems.lengths, -1, 0), answer_length]
        closing = [*[1] * (len(parts) - 2), self.equals, self.end]
        t = jnp.arange(length)
        tokens = jnp.full((*answer_length.shape, length), self.end, jnp.int32)
        start = jnp.zeros((*answer_length.shape, 1), jnp.int32)
        for part, part_length, symbol in zip(parts, lengths, closing, strict=True):
            stop = start + part_length[..., None]
            place = jnp.clip(t - start, 0, part.shape[-1] - 1)
            written = jnp.take_along_axis(part, place, axis=-1).astype(jnp.int32)
            tokens = jnp.where((start <= t) & (t < stop), self.first_symbol + written, tokens)
            tokens = jnp.where(t == stop, symbol, tokens)
            mask = (start <= t) & (t <= stop)
            start = stop + 1
        return tokens, mask

    def batch(self, problems: Problems, length: int) -> Batch:
        """One problem a row, then newlines that no loss or score counts: a `[count, length]` batch.

        Args:
          problems: `[count]` of them.
          length: of the rows; a problem that it cuts still counts as far as it goes.
        """
        if not self.one_pass:
            return next_token_batch(*self.render(problems, length + 1))
        if self.in_place:
            t = jnp.arange(length)
            written = (t >= 1) & (t <= problems.lengths)
            inputs, answers = problems.inputs[..., 0, :], self.answers(problems)[0]
            place = lambda symbols: jnp.where(  # noqa: E731
                written, self.first_symbol + _behind_one(symbols, length), self.end
            )
            return Batch(place(inputs).at[..., :1].set(self.equals), place(answers), written)
        text, answer = self.render(problems, length)
        start = problems.lengths.sum(-1) + self.inputs
        blanks = self.answer_length(self.lengths(problems)) + 1
        t = jnp.arange(length)
        blank = (start[..., None] <= t) & (t < (start + blanks)[..., None])
        return Batch(jnp.where(blank, self.blank, text), text, answer)

    def row_length(self, length: int) -> int:
        """Tokens that a model reads of the longest problem of a length: of a text that it writes
        itself, all but the last."""
        return self.filled_length(length) - (not self.one_pass)

    def filled_length(self, length: int) -> int:
        """Tokens of a row that holds the longest problem of a length and its answer: its text, or
        in place `=` and the input."""
        return self.input_length(length) + 1 if self.in_place else self.text_length(length)

    def written_lengths(self, problems: Problems) -> jax.Array:
        """Tokens of each problem's text, int32 `[...]`."""
        return problems.lengths.sum(-1) + self.answers(problems)[1] + self.inputs + 1

    def answering(self, tokens: jax.Array) -> jax.Array:
        """Where an answer is being written: from each `=` up to its newline, or its blanks, or in
        place the input's symbols, bool `[..., length]`."""
        if self.in_place:
            return self.is_symbol(tokens)
        if self.one_pass:
            return tokens == self.blank
        t = jnp.arange(tokens.shape[-1])
        last = lambda token: jax.lax.cummax(  # noqa: E731
            jnp.where(tokens == token, t, -1), axis=tokens.ndim - 1
        )
        return last(self.equals) > last(self.end)

    def after_end(self, tokens: jax.Array) -> jax.Array:
        """Where a row's first problem is over, from its newline on, bool `[..., length]`."""
        return jax.lax.cummax((tokens == self.end).astype(jnp.int32), axis=tokens.ndim - 1) > 0

    # ---- What people read and write. ----

    def in_written_order(self, sequence: Written) -> Written:
        """An input or answer, or what belongs to its symbols, in the order that the model writes it
        in, given that of people; and back."""
        return sequence

    def check(self, problem: tuple[str, ...]) -> None:
        """Raises ValueError for inputs that no problem of the task has, saying why."""
        return None

    @property
    def example(self) -> tuple[str, ...]:
        """A problem for messages and help."""
        return (self.symbols[: 1 + min(3, len(self.symbols) - 1)],) * self.inputs

    def parse(self, text: str, longest: int) -> tuple[str, ...]:
        """The problem that a person writes, `123+456` or `123+456=579`.

        Args:
          text: what was written.
          longest: the length that the problem may have.

        Raises:
          ValueError: saying what is wrong with the text.
        """
        one, operator = f"[{re.escape(self.symbols)}]+", re.escape(self.operator)
        problem = one + f"{operator}{one}" * (self.inputs - 1)
        match = re.fullmatch(rf"({problem})(?:=([{re.escape(self.symbols)}]*))?", text)
        if not match:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise ValueError(f"{shown!r} is not a problem such as {self.format(self.example)}")
        inputs = tuple(match[1].split(self.operator)) if self.operator else (match[1],)
        if self.length(inputs) > longest:
            raise ValueError(f"a problem of {self.length(inputs)} {self.unit}: at most {longest}")
        self.check(inputs)
        right = self.solve(inputs)
        if match[2] is not None and match[2] != right:
            raise ValueError(f"{match[1]}={match[2]} is wrong: it is {right}")
        return inputs

    def format(self, problem: Sequence[str]) -> str:
        """`123+456`."""
        return self.operator.join(problem)

    def prompt(self, problem: Sequence[str]) -> str:
        """`321+654=`, what a model is asked to go on from, or `321+654=_____`, to fill in, or in
        place `=1011`."""
        if self.in_place:
            return "=" + self.in_written_order(problem[0])
        blanks = self.answer_length(self.length(problem)) + 1 if self.one_pass else 0
        return f"{self._asked(problem)}{BLANK * blanks}"

    def answer_start(self, problem: Sequence[str]) -> int:
        """The place of an answer's first symbol in a row."""
        return 1 if self.in_place else len(self._asked(problem))

    def text(self, problem: tuple[str, ...]) -> str:
        """`321+654=975` and a newline."""
        return f"{self._asked(problem)}{self.in_written_order(self.solve(problem))}\n"

    def _asked(self, problem: Sequence[str]) -> str:
        return self.operator.join(map(self.in_written_order, problem)) + "="

    def length(self, problem: Sequence[str]) -> int:
        """The size of one problem, as `lengths` gives it."""
        return self.size_of(max(map(len, problem)))

    def raster(self, problem: Sequence[str]) -> Raster | None:
        """How a problem of one input, and its answer, are laid out in rows for pictures; None where
        they are a line."""
        return None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Raises ValueError for a character outside the vocabulary."""
        return [self.vocabulary.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(self.vocabulary[token] for token in tokens)

    def arrays(self, problems: Sequence[Sequence[str]]) -> Problems:
        """Host arrays of people's problems, wide enough for the longest input."""
        width = max(len(each) for problem in problems for each in problem)
        index = {symbol: i for i, symbol in enumerate(self.symbols)}

        def symbols(text: str) -> list[int]:
            written = [index[symbol] for symbol in self.in_written_order(text)]
            return written + [0] * (width - len(written))

        return Problems(
            np.array([list(map(symbols, problem)) for problem in problems], np.uint8),
            np.array([list(map(len, problem)) for problem in problems], np.int32),
        )

    def pad(self, problems: Problems, width: int) -> Problems:
        """Host arrays for inputs of `width` symbols, with zeros behind, or without so many:
        programs are compiled for their width."""
        inputs = np.asarray(problems.inputs)[..., :width]
        inputs = np.pad(inputs, [(0, 0)] * 2 + [(0, width - inputs.shape[-1])])
        return Problems(inputs, np.asarray(problems.lengths))

    def _stack(self, inputs, xp=jnp) -> Problems:
        stacked = xp.stack([symbols for symbols, _ in inputs], -2)
        return self.arrange(stacked, xp.stack([length for _, length in inputs], -1), xp)

    # Programs that are compiled for a task serve all its instances that answer alike.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.answered == other.answered

    def __hash__(self) -> int:
        return hash((type(self), self.answered))


def of(data) -> Task:
    """The task that a configuration's section `data` names, answered as it says."""
    return TASKS.get(data.task)(data.answers)


def next_token_batch(tokens: jax.Array, answer: jax.Array) -> Batch:
    """Texts and the mask of their answers, `[..., length + 1]`, as a batch of that length."""
    return Batch(tokens[..., :-1], tokens[..., 1:], answer[..., 1:])


def _behind_one(symbols: jax.Array, length: int) -> jax.Array:
    """int32 `[..., length]` of symbols `[..., width]` from the second place on; zeros elsewhere."""
    more = max(0, length - 1 - symbols.shape[-1])
    filled = jnp.pad(symbols, [(0, 0)] * (symbols.ndim - 1) + [(1, more)])
    return filled[..., :length].astype(jnp.int32)


def uniform_symbols(key: jax.Array, lowest: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 symbols from `lowest` to below `stop`, as `jax.random.randint` gives them for the
    shape: an array of the host.

    With partitionable keys a symbol depends on its place in the flat array alone: the start of a
    longer one is the shorter one, and a program for each power of two serves all shapes.
    """
    size = math.prod(shape)
    with jax.threefry_partitionable(True):
        rounded = max(LEAST_DRAWN, 1 << (size - 1).bit_length())
        drawn = _flat_symbols(key, lowest, stop, rounded)
    return np.asarray(drawn)[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=3)
def _flat_symbols(key: jax.Array, lowest, stop, size: int) -> jax.Array:
    return jax.random.randint(key, (size,), lowest, stop, dtype=jnp.uint8)
