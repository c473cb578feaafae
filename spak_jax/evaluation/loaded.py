"""A model as a run left it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from spak_jax import jax_settings, models, provenance, tasks
from spak_jax.command_line import InputError
from spak_jax.config import Config
from spak_jax.tasks import Task
from spak_jax.training import checkpoint, run_folder
from spak_jax.training.named_arrays import from_named


class LoadedModel(NamedTuple):
    """A model as a run left it: configuration, weights (an `nnx.State`), steps trained."""

    config: Config
    weights: Any
    step: int

    @property
    def task(self) -> Task:
        return tasks.of(self.config.data)

    def describe(self) -> dict[str, Any]:
        """What model something was found out about, and where and when."""
        return {
            "system": self.config.system,
            "config": self.config.model_dump(mode="json"),
            "parameters": models.parameter_count(self.weights),
            "step": self.step,
            "dtype": str(models.compute_dtype(self.config.model.dtype)),
            **provenance.where_and_when(),
        }


@jax_settings.fixed()
def load(run: Path) -> LoadedModel:
    """The newest checkpoint of a run folder as a model.

    Raises:
      InputError: the folder holds none that can be used.
    """
    if seeds := seed_folders(run):
        raise InputError(
            f"{run} holds runs of several seeds: name one of {', '.join(map(str, seeds))}"
        )
    restored = checkpoint.restore(run)
    _, like = models.abstract(restored.config)
    try:
        weights = from_named(like, restored.weights)
    except ValueError as error:
        raise InputError(f"the checkpoint of step {restored.step} in {run}: {error}") from None
    return LoadedModel(restored.config, jax.device_put(weights), restored.step)


def seed_folders(run: Path) -> list[Path]:
    """The run folders in a folder of several seeds, by rising seed; none in a run folder."""
    if not run.is_dir() or run_folder.steps_in(run):
        return []
    folders = {
        int(number): folder
        for folder in run.iterdir()
        if (number := folder.name.removeprefix("seed")).isdecimal()
        and folder.name == f"seed{number}"
        and run_folder.steps_in(folder)
    }
    return [folders[seed] for seed in sorted(folders)]
