"""Names that a configuration chooses by: tasks, position schemes and blocks.

A class is registered under a name by the module that defines it, by a package of someone else's
through an entry point, or from a notebook:

    @TASKS.register("caesar")
    class Caesar(Task): ...
"""

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeVar

Registered = TypeVar("Registered", bound=type[Any])


class Registry:
    """Classes of one kind, by name.

    Modules and entry points are loaded when a name is first asked for, so that nothing here
    imports what is registered here.

    Args:
      kind: what the classes are, for messages: "task".
      group: the entry points by which installed packages add to it.
      modules: those of this package that register their own.
    """

    def __init__(self, kind: str, group: str, modules: tuple[str, ...]):
        self.kind = kind
        self._group, self._modules = group, modules
        self._loaded = False
        self._classes: dict[str, type[Any]] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that adds a class; in a notebook a class of the same module replaces its
        former self.

        Raises:
          ValueError: another class has the name.
        """

        def add(registered: Registered) -> Registered:
            known = self._classes.get(name)
            if known is not None and _whose(known) != _whose(registered):
                raise ValueError(f"{self.kind} {name!r} is {known.__module__}.{known.__qualname__}")
            self._classes[name] = registered
            setattr(registered, "name", name)  # noqa: B010
            return registered

        return add

    def names(self) -> tuple[str, ...]:
        """All names, those of this package first."""
        self._load()
        return tuple(self._classes)

    def get(self, name: str) -> type[Any]:
        """The class of a name.

        Raises:
          ValueError: there is none; says which there are.
        """
        self._load()
        if name not in self._classes:
            close = difflib.get_close_matches(str(name), self._classes, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{self.kind} {name!r}: {hint}one of {', '.join(self._classes)}")
        return self._classes[name]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for module in self._modules:
            importlib.import_module(module)
        for point in importlib.metadata.entry_points(group=self._group):
            self.register(point.name)(point.load())


def _whose(registered: type[Any]) -> tuple[str, str]:
    return registered.__module__, registered.__qualname__


TASKS = Registry(
    "task",
    "spak_jax.tasks",
    tuple(
        f"spak_jax.tasks.{module}"
        for module in (
            "arithmetic",
            "multiplication",
            "parity",
            "groups",
            "copying",
            "reversing",
            "sorting",
            "hops",
            "mazes",
        )
    ),
)
POSITIONS = Registry(
    "position scheme",
    "spak_jax.positions",
    tuple(
        f"spak_jax.positions.{module}" for module in ("rope", "order", "coupled", "learned", "grid")
    ),
)
BLOCKS = Registry("block", "spak_jax.blocks", ("spak_jax.models.block",))
