"""Metrics of GPUs and of kernels compiled for them, by name (`language`)."""

from collections.abc import Iterable, Mapping, Sequence

from pallas_kernels import tiles
from pallas_kernels.kernel_names import current_name
from pallas_kernels.targets import TARGETS
from pallas_kernels.tuning.aot import Report
from pallas_kernels.tuning.cases import ATTENTION, Case
from pallas_kernels.tuning.shapes import Shape
from pallas_kernels.tuning.stream_cases import OPERATIONS
from spak_jax.config import Config
from spak_jax.config_sections import Architecture
from spak_jax.registry import POSITIONS
from spak_jax.specs.language import ExpressionError, Impossible, Path, Unknown, Value, spelled

# Each with its unit and meaning.
OF_TARGET = {
    "shared_memory_per_block": "bytes that a block can ask for at most",
    "memory": "bytes of the GPU",
    "l2": "bytes",
    "multiprocessors": "their number",
    "bandwidth": "bytes a second, of the memory",
}
OF_KERNEL = {
    "shared_memory": "bytes of a block",
    "registers": "of a thread",
    "spilled": "bytes that a thread stores for want of registers",
}
# The kernels that a name in an expression stands for; of several, the largest number counts.
KERNELS: Mapping[str, Sequence[str]] = {
    "attention": tiles.KERNELS,
    **{kernel: (kernel,) for kernel in tiles.KERNELS},
    **OPERATIONS,
}


def of_target(target: str | None, path: Path) -> Value:
    """A metric of a target, such as `target.memory`."""
    _require(path, 2, OF_TARGET)
    if target is None:
        raise Unknown("no target is given")
    name = {"shared_memory_per_block": "shared_memory"}.get(path[1], path[1])
    return getattr(TARGETS[target], name)


def require_kernel(path: Path) -> None:
    """Raises `ExpressionError` unless a path is a kernel's metric, such as
    `kernel.attention.shared_memory`."""
    if len(path) < 2 or current_name(path[1]) not in KERNELS:
        raise ExpressionError(
            f"no metric {spelled(path)}: of kernels there are {', '.join(KERNELS)}"
        )
    _require(path[1:], 2, OF_KERNEL)


def of_kernels(reports: Iterable[Report], path: Path) -> Value:
    """A kernel's metric, the largest of all reports of the kernels that it names.

    Raises:
      ExpressionError: there is no such metric.
      Unknown: nothing is reported of it.
      Impossible: a kernel does not compile.
    """
    require_kernel(path)
    _, name, part = path
    named = [report for report in reports if report.kernel in KERNELS[current_name(name)]]
    if not named:
        raise Unknown(f"no {name} kernel runs here")
    values = [getattr(report, part) for report in named]
    if any(value is None for value in values):
        failed = next(report for report in named if getattr(report, part) is None)
        raise Impossible(f"{failed.kernel} does not compile: {failed.problem}")
    return max(values)


def training_dtype(config: Config) -> str:
    """The dtype of products in a training step of a configuration on a GPU."""
    return "float32" if config.model.dtype == "float32" else "bfloat16"


def training_attention(config: Config) -> Case | None:
    """Attention in a training step of a configuration on a GPU; None where its model has none."""
    architecture, data = config.model, config.data
    if not isinstance(architecture, Architecture):
        return None
    scheme = POSITIONS.get(architecture.positions)
    clip = architecture.max_relative_distance
    entries = scheme.bias_entries(data.row_length, clip)
    if entries is not None:
        clip = len(entries) // 2 - 1
    return Case(
        ATTENTION,
        Shape(
            config.train.batch,
            data.row_length,
            architecture.heads,
            architecture.width // architecture.heads,
        ),
        training_dtype(config),
        rope=scheme.rotates,
        rate=architecture.dropout,
        clip=clip if scheme.has_ids else None,
    )


def _require(path: Path, parts: int, known: Mapping[str, str]) -> None:
    if len(path) != parts or path[-1] not in known:
        raise ExpressionError(f"no metric {spelled(path)}: {path[0]} has {', '.join(known)}")
