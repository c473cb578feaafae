"""What laws may say of GPUs and of kernels compiled for them, by name (`laws`)."""

from collections.abc import Iterable, Mapping, Sequence

from pallas_kernels import tiles
from pallas_kernels.compile import Report
from pallas_kernels.laws import Impossible, LawError, Path, Unknown, Value, spelled
from pallas_kernels.stream_cases import OPERATIONS
from pallas_kernels.targets import TARGETS

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
# The kernels that a name in a law stands for; of several, the largest number counts.
KERNELS: Mapping[str, Sequence[str]] = {
    "attention": tiles.KERNELS,
    **{kernel: (kernel,) for kernel in tiles.KERNELS},
    **OPERATIONS,
}


def of_target(target: str | None, path: Path) -> Value:
    """A quantity of a target, such as `target.memory`."""
    _require(path, 2, OF_TARGET)
    if target is None:
        raise Unknown("no target is given")
    name = {"shared_memory_per_block": "shared_memory"}.get(path[1], path[1])
    return getattr(TARGETS[target], name)


def require_kernel(path: Path) -> None:
    """Raises `LawError` unless a path is a kernel's quantity, such as
    `kernel.attention.shared_memory`."""
    if len(path) < 2 or path[1] not in KERNELS:
        raise LawError(f"no quantity {spelled(path)}: of kernels there are {', '.join(KERNELS)}")
    _require(path[1:], 2, OF_KERNEL)


def of_kernels(reports: Iterable[Report], path: Path) -> Value:
    """A kernel's quantity, the largest of all reports of the kernels that it names.

    Raises:
      LawError: there is no such quantity.
      Unknown: nothing is reported of it.
      Impossible: a kernel does not compile.
    """
    require_kernel(path)
    _, name, part = path
    named = [report for report in reports if report.kernel in KERNELS[name]]
    if not named:
        raise Unknown(f"no {name} kernel runs here")
    values = [getattr(report, part) for report in named]
    if any(value is None for value in values):
        failed = next(report for report in named if getattr(report, part) is None)
        raise Impossible(f"{failed.kernel} does not compile: {failed.problem}")
    return max(values)


def _require(path: Path, parts: int, known: Mapping[str, str]) -> None:
    if len(path) != parts or path[-1] not in known:
        raise LawError(f"no quantity {spelled(path)}: {path[0]} has {', '.join(known)}")
