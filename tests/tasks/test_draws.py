"""What a seed draws never changes, whatever JAX's settings are: results files can be made again."""

import contextlib
import hashlib

import jax
import numpy as np
import pytest
from conftest import in_turn

from spak_jax import jax_settings
from spak_jax.config_sections import Data
from spak_jax.data import make_dataset, sample_published_columns, sample_training, training_batch
from spak_jax.registry import TASKS
from spak_jax.tasks import base
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

# By task and what is drawn: how SHA-256 over dtypes, shapes and bytes begins.
DIGESTS = {
    "exact addition 1 7": "2d23ad076752c4e3",
    "exact addition 2 5": "92848619ce3bf627",
    "exact addition 3 300": "7998555e05e79c43",
    "exact addition 12 1000": "e4cf552af57e889f",
    "exact addition 37 20": "2e4e0ea92bc24114",
    "exact addition 100 64": "c66cabe11b765678",
    "exact addition 1000 3": "e6c6e678ad3bb30a",
    "columns addition 1": "7696485f70fbda2f",
    "columns addition 50": "fa4da403c885de4a",
    "columns addition 5000": "282021dabdaeb226",
    "batch addition packed": "59fe27563af53173",
    "dataset addition": "0220aa01dd7e9d0d",
    "rows addition packed": "c76415c3046f36b6",
    "batch addition single": "8d9f8ab87601472e",
    "rows addition single": "99a4ab021a1508c3",
    "training addition": "98a0864cb64f76b2",
    "exact subtraction 1 7": "f5e25d28f8e7fd5c",
    "exact subtraction 2 5": "ac42f50a6e61b683",
    "exact subtraction 3 300": "51409a920717a6cd",
    "exact subtraction 12 1000": "4ea9af5aba9dc9bb",
    "exact subtraction 37 20": "4b6b14d03606707e",
    "exact subtraction 100 64": "0725eb126a6a2782",
    "exact subtraction 1000 3": "ce2d7641fada9773",
    "columns subtraction 1": "7696485f70fbda2f",
    "columns subtraction 50": "3220129f823f7b4f",
    "columns subtraction 5000": "9a2ae1dbdd35c5aa",
    "batch subtraction packed": "fa850ab3fff8f26f",
    "dataset subtraction": "4e6c8c933cb65291",
    "rows subtraction packed": "f02eb07bbb2771b6",
    "batch subtraction single": "2e1ba60a418cae2a",
    "rows subtraction single": "74279a3920e9a25e",
    "training subtraction": "79b923e0b004a228",
    "exact three-operands 1 7": "01ac1903560e3eb0",
    "exact three-operands 2 5": "54876514fd5c3c74",
    "exact three-operands 3 300": "8d60d49fcff1a2a7",
    "exact three-operands 12 1000": "99da8bd61033ca39",
    "exact three-operands 37 20": "d968143706acedcc",
    "exact three-operands 100 64": "1c90576830f6f1b3",
    "exact three-operands 1000 3": "da4041a7bc5131f5",
    "columns three-operands 1": "b498996b860d40da",
    "columns three-operands 50": "22c25a8400d26ed6",
    "columns three-operands 5000": "655a83288fd1a554",
    "batch three-operands packed": "90c0246bb2fce782",
    "dataset three-operands": "2688fd99277435db",
    "rows three-operands packed": "ee0340b49be2b21c",
    "batch three-operands single": "91e006f587ed92fe",
    "rows three-operands single": "38662ed1ba6b03f9",
    "training three-operands": "42a268923f95c480",
}
SETTINGS = {
    "as they are": [],
    "others": [lambda: jax.enable_x64(True), lambda: jax.default_prng_impl("rbg")],
}


def digest(tree) -> str:
    total = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(tree)):
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def drawn(name: str) -> dict[str, str]:
    """Digests of all that is drawn for a task."""
    key, task, found = jax_settings.key, TASKS.get(name)(), {}
    for digits, count in ((1, 7), (2, 5), (3, 300), (12, 1000), (37, 20), (100, 64), (1000, 3)):
        of_length = jax.random.fold_in(key(20 + digits), digits)
        problems = task.sample_exact(of_length, digits, count)
        found[f"exact {name} {digits} {count}"] = digest(problems)
    for count in (1, 50, 5000):
        problems = sample_published_columns(jax.random.fold_in(key(3), 0), count, task)
        found[f"columns {name} {count}"] = digest(problems)

    @jax.jit
    def batches():
        made = {"training": sample_training(key(9), Data(task=name), (40, 3))}
        fixed = Data(task=name, examples=900, seed=4, row_length=64)
        # No layout is asked for when a dataset is drawn.
        dataset = make_dataset(fixed)
        for layout in ("packed", "single"):
            data = Data(task=name, layout=layout, examples=0, row_length=64)
            fixed = fixed.model_copy(update={"layout": layout})
            made |= {
                f"batch {layout}": training_batch(key(5), data, 16, None),
                f"rows {layout}": training_batch(key(6), fixed, 16, dataset[0]),
            }
        return made, dataset

    made, dataset = batches()
    for what, arrays in made.items():
        kind, *layout = what.split()
        found[" ".join((kind, name, *layout))] = digest(arrays)
    found[f"dataset {name}"] = digest(dataset)
    return found


@pytest.mark.parametrize(
    ("task", "setting"),
    in_turn(("addition", "subtraction", "three-operands"), list(SETTINGS)),
)
def test_a_seed_draws_what_it_always_drew(task, setting):
    with contextlib.ExitStack() as stack:
        for changed in SETTINGS[setting]:
            stack.enter_context(changed())
        found = drawn(task)
    assert found == {name: digest for name, digest in DIGESTS.items() if name.split()[1] == task}


def test_problems_of_many_lengths_share_programs():
    """Drawing them once compiled a program for each length: a third of what scoring waited for."""
    base._flat_symbols.clear_cache()
    for digits in range(1, 100):
        ADDITION.sample_exact(jax_settings.key(0), digits, 10)
    assert base._flat_symbols._cache_size() <= 2
