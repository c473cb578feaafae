"""The sections of a configuration that build a run, and what is checked of each.

They know nothing of arrays and nothing of files; `config` puts them together.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spak_jax.registry import BLOCKS, POSITIONS, TASKS, Registry

# The longest input that training data or a scoring set may ask for, in symbols.
MAX_LENGTH = 10_000

Length = Annotated[int, Field(ge=1, le=MAX_LENGTH)]
# Sizes and steps are int32 where they reach arrays.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Of a mean over steps; with 1 nothing would ever enter it.
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _registered(registry: Registry, key: str, name: str) -> type[Any]:
    """The class that a key names; raises ValueError, with the key, where there is none."""
    try:
        return registry.get(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


class Network(Section):
    """What all models have in common."""

    width: Positive
    # Whether tokens see those before them alone; for answers in one pass they may see all.
    causal: bool = True
    # Standard deviation of the first weights.
    init_std: Annotated[float, Field(gt=0)] = 0.02
    # Whether token embeddings enter times the root of the width (Vaswani et al. 2017).
    scale_embedding: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # The type of activations and products; weights and the residual stream stay float32.
    # "auto" is bfloat16 on a GPU and float32 elsewhere.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def described(self) -> str:
        """What it is, in words for messages."""
        raise NotImplementedError

    def depth(self, loops: int | None = None) -> int:
        """Blocks or layers that each token goes through, one after another.

        loops: of a model that loops; None for as many as in training.
        """
        raise NotImplementedError


class Architecture(Network):
    """What the static and the looped model, which are transformers, have in common."""

    heads: Positive
    mlp: Literal["gelu", "swiglu"] = "gelu"
    # MLP channels; None is 4 widths, or 8/3 of it with "swiglu", which has a third matrix.
    hidden: Positive | None = None
    # The class of its blocks, by name (`spak_jax.models.block`).
    block: str = "transformer"
    # How the model knows where tokens are, by name (`spak_jax.positions`); the "coupled" schemes
    # are given position ids: which digits belong together.
    positions: str = "rope"
    # Of biases: the largest difference of ids that has a bias of its own.
    max_relative_distance: Annotated[int, Field(ge=1, le=64)] = 1
    # Whether keys whose ids differ by more than `max_relative_distance` are masked.
    window: bool = False

    @model_validator(mode="after")
    def _parts_are_registered(self) -> Self:
        _registered(BLOCKS, "model.block", self.block)
        _registered(POSITIONS, "model.positions", self.positions)
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        scheme = POSITIONS.get(self.positions)
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} must divide model.width = {self.width}")
        if scheme.rotates and self.width // self.heads % 2:
            raise ValueError(
                f"model.heads = {self.heads} gives heads of {self.width // self.heads}"
                " channels; RoPE turns pairs of channels, so their number must be even"
            )
        if self.window and not scheme.has_ids:
            others = [name for name in POSITIONS.names() if POSITIONS.get(name).has_ids]
            raise ValueError(
                f"model.window = true needs ids to go by: model.positions = {self.positions!r} has"
                f" none, {', '.join(others)} do"
            )
        return self


class StaticModel(Architecture):
    """`layers` blocks, each with weights of its own (GPT-12L)."""

    kind: Literal["gpt"]
    layers: Positive

    @property
    def described(self) -> str:
        return f"a stack of {self.layers} block{'s' * (self.layers > 1)}"

    def depth(self, loops: int | None = None) -> int:
        return self.layers


class LoopedModel(Architecture):
    """One block applied `loops` times (LoopLM)."""

    kind: Literal["loop"]
    loops: Positive
    # Whether each loop starts from the last one's state with the embedded input added again.
    inject_input: bool = False
    # Whether each loop starts from the last one's state under a LayerNorm, so that states stay as
    # large as they were however often the block is applied.
    normalize_state: bool = False
    # Whether a loop is handed what the last one's state reads out in place of that state: each
    # symbol's probability, embedded (self-conditioning, Chen et al. 2023, Analog Bits, arXiv
    # 2208.04202; here with nothing beside it). What is all but certain is the same however it came
    # about, so small errors of a state do not add up along a row.
    answer_feedback: bool = False
    # Whether all loops share one step embedding.
    shared_step: bool = False
    # Training first runs a random number of loops, up to this, that no gradient passes.
    no_grad_warmup_loops: Annotated[int, Field(ge=0, le=1_000)] = 0
    # The last so many loops of training are read out and scored (deep supervision, Lee et al.
    # 2015); None for the second half.
    supervised_loops: Positive | None = None

    @property
    def described(self) -> str:
        return f"a block looped {self.loops} time{'s' * (self.loops > 1)}"

    def depth(self, loops: int | None = None) -> int:
        return loops or self.loops

    @model_validator(mode="after")
    def _supervised_loops_are_run(self) -> Self:
        if (self.supervised_loops or 0) > self.loops:
            raise ValueError(
                f"model.supervised_loops = {self.supervised_loops}: at most model.loops ="
                f" {self.loops}"
            )
        return self

    @model_validator(mode="after")
    def _warmup_loops_are_like_others(self) -> Self:
        if self.no_grad_warmup_loops and not self.shared_step:
            raise ValueError(
                f"model.no_grad_warmup_loops = {self.no_grad_warmup_loops} needs"
                " model.shared_step = true: before a random number of loops no step has an"
                " embedding of its own"
            )
        return self


class GRUModel(Network):
    """`layers` gated recurrent units, one above another, each as wide as the embedding (Cho et al.
    2014, Learning Phrase Representations): what reads tokens one by one, to compare with.
    """

    kind: Literal["gru"]
    layers: Positive = 1
    # It takes no positions: it reads tokens in order.
    positions: ClassVar[str] = "none"

    @property
    def described(self) -> str:
        return f"a GRU of {self.layers} layer{'s' * (self.layers > 1)}"

    def depth(self, loops: int | None = None) -> int:
        return self.layers

    @model_validator(mode="after")
    def _both_directions_are_as_wide(self) -> Self:
        if not self.causal and self.width % 2:
            raise ValueError(
                f"model.width = {self.width} must be even with model.causal = false: each direction"
                " has half of it"
            )
        return self


class Data(Section):
    """The distribution of training problems, and how they are laid out in rows."""

    # The name of a registered task (`spak_jax.tasks`).
    task: str = "addition"
    # Inputs have at most so many symbols, or what the task counts (`Task.unit`).
    max_length: Length = 4
    # With this chance a problem's inputs have at most 5 or 6 symbols instead, chosen evenly.
    bridge_fraction: Fraction = 0.3
    bridge_lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = (5, 6)
    # Of the training, from its start: while longest inputs grow evenly from one symbol to those
    # above (a curriculum of lengths, Bengio et al. 2009).
    curriculum: Fraction = 0.0
    # How answers are given: each symbol after the one before it; all in one pass over blanks; or,
    # where a problem's one input is as long as its answer, in one pass over the input itself.
    answers: Literal["symbol-by-symbol", "one-pass", "in-place"] = "symbol-by-symbol"
    # "packed": problems follow one another in a row; "single": one problem a row, padded.
    layout: Literal["packed", "single"] = "packed"
    row_length: Positive = 64
    # Problems drawn once and reused for the whole training; 0 for fresh ones at every step.
    examples: Annotated[int, Field(ge=0, le=10_000_000)] = 180_000
    seed: Seed = 0

    @property
    def one_pass(self) -> bool:
        """Whether all symbols of an answer are read out at once."""
        return self.answers != "symbol-by-symbol"

    @property
    def longest(self) -> int:
        """The longest that an input can be in training; longer ones are zero-shot."""
        bridge = self.bridge_lengths if self.bridge_fraction > 0 else ()
        return max((self.max_length, *bridge))

    @model_validator(mode="after")
    def _rows_hold_a_problem(self) -> Self:
        try:
            task = _registered(TASKS, "data.task", self.task)(self.answers)
        except ValueError as error:
            raise ValueError(str(error).replace("answered", "data.answers", 1)) from None
        needed = task.row_length(self.longest)
        if self.row_length < needed:
            raise ValueError(
                f"data.row_length = {self.row_length} cannot hold a problem of {self.longest}"
                f" {task.unit}: at least {needed} tokens are needed"
            )
        if 0 < self.examples < 9:
            raise ValueError(
                f"data.examples = {self.examples} leaves no validation problem: 0 for an endless"
                " stream, or at least 9"
            )
        if self.curriculum and self.examples:
            raise ValueError(
                f"data.curriculum = {self.curriculum} needs data.examples = 0: problems that are"
                " drawn once do not grow"
            )
        if self.one_pass and self.layout == "packed":
            raise ValueError(
                f'data.answers = "{self.answers}" needs data.layout = "single": one problem a row'
            )
        return self


class Train(Section):
    """The recipe: AdamW, warm-up, cosine decay; everything counted in optimizer steps."""

    steps: Positive = 15_000
    batch: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_steps: Positive = 15_000
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Seed = 0
    # Trainings in one program, with the seeds `seed`, `seed + 1`, ...; each has a run folder.
    seeds: Annotated[int, Field(ge=1, le=64)] = 1
    # The most steps that one compiled call runs, between two looks at the loss.
    steps_per_call: Positive = 100
    checkpoint_every: Positive = 1_000

    @model_validator(mode="after")
    def _schedule_ends_after_warmup(self) -> Self:
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"train.decay_steps = {self.decay_steps} must exceed train.warmup_steps ="
                f" {self.warmup_steps}: it counts from the first step"
            )
        return self

    @model_validator(mode="after")
    def _every_seed_is_one(self) -> Self:
        if self.seed + self.seeds > 2**31:
            raise ValueError(
                f"train.seeds = {self.seeds} from train.seed = {self.seed} on: the last,"
                f" {self.seed + self.seeds - 1}, must be less than {2**31}"
            )
        return self


class Parallel(Section):
    """The devices that a training is spread over: `data` times `seeds` of them.

    No part of what is computed: no checkpoint or results file holds it, and a run that was begun on
    some devices goes on with others.
    """

    # Devices that the rows of every batch are split over.
    data: Positive = 1
    # Groups of devices that the seeds (`train.seeds`) are split over, with nothing to exchange.
    seeds: Positive = 1
    # Whether each of the `data` devices keeps a share of the weights and of the optimizer's arrays
    # alone, instead of all of them; each step brings the weights together.
    shard_weights: bool = False

    @model_validator(mode="after")
    def _shares_need_devices(self) -> Self:
        if self.shard_weights and self.data == 1:
            raise ValueError("parallel.shard_weights = true needs parallel.data of at least 2")
        return self


class Evaluation(Section):
    """The zero-shot scoring that ends a training."""

    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = tuple(range(1, 13))
    examples: Positive = 1_000
    seed: Seed = 0


# Names files and folders, so it must be a plain file name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class RunSections(Section):
    """What builds a run, but for the system's name."""

    name: Name
    model: Annotated[StaticModel | LoopedModel | GRUModel, Field(discriminator="kind")]
    # Made when it is asked for: its task is looked up then.
    data: Annotated[Data, Field(default_factory=Data)]
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    parallel: Annotated[Parallel, Field(exclude=True)] = Parallel()

    @model_validator(mode="after")
    def _what_is_written_is_not_seen(self) -> Self:
        if not self.model.causal and not self.data.one_pass:
            raise ValueError(
                'model.causal = false needs data.answers = "one-pass" or "in-place": symbol by'
                " symbol a model would see what it is to predict"
            )
        return self

    @model_validator(mode="after")
    def _ids_are_those_of_the_scheme(self) -> Self:
        scheme, task = POSITIONS.get(self.model.positions), TASKS.get(self.data.task)
        if scheme.needs_position_ids and scheme.grid_ids != task.grid_ids:
            kinds = {False: "of a line", True: "of a grid"}
            raise ValueError(
                f"model.positions = {self.model.positions!r} goes by position ids"
                f" {kinds[scheme.grid_ids]}: those of data.task = {self.data.task!r} are"
                f" {kinds[task.grid_ids]}"
            )
        return self

    @model_validator(mode="after")
    def _devices_share_evenly(self) -> Self:
        for split, whole, count in (
            ("data", "batch", self.train.batch),
            ("seeds", "seeds", self.train.seeds),
        ):
            devices = getattr(self.parallel, split)
            if count % devices:
                raise ValueError(
                    f"parallel.{split} = {devices} must divide train.{whole} = {count}"
                )
        return self


MODEL_KINDS = {"gpt": StaticModel, "loop": LoopedModel, "gru": GRUModel}
