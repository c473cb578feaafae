"""What models learn: a task is one class in one file (`base.Task`), found by its name."""

from spak_jax.tasks.base import Batch, Problems, Task, next_token_batch, of

__all__ = ["Batch", "Problems", "Task", "next_token_batch", "of"]
