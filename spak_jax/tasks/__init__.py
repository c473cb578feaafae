"""What models learn: a task is one class in one file (`base.Task`), found by its name."""

from spak_jax.tasks.base import Problems, Task, of

__all__ = ["Problems", "Task", "of"]
