"""Looped transformers that answer longer problems than they were trained on, in JAX.

    import spak_jax as spak

    run = spak.load("released/pointer")
    run.solve("123+456")

The programs are `spak train`, `spak evaluate`, `spak solve` and so on, or `python -m
spak_jax.train` and its sisters; `spak --help` names them all.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spak_jax.__main__ import main as main
    from spak_jax.config import Config as Config
    from spak_jax.registry import BLOCKS as BLOCKS
    from spak_jax.registry import POSITIONS as POSITIONS
    from spak_jax.registry import TASKS as TASKS
    from spak_jax.run import Run as Run
    from spak_jax.run import load as load
    from spak_jax.run import train as train
    from spak_jax.tasks import Problems as Problems
    from spak_jax.tasks import Task as Task

# Where the public names lie. They are imported when they are asked for: programs that need few of
# them start sooner.
_HOMES = {
    "BLOCKS": "registry",
    "Config": "config",
    "POSITIONS": "registry",
    "Problems": "tasks",
    "Run": "run",
    "TASKS": "registry",
    "Task": "tasks",
    "load": "run",
    "main": "__main__",
    "train": "run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
