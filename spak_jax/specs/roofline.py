"""What a training step asks of a GPU that is not there: its memory, compiled; its time, estimated.

The program is compiled for the GPU without it (`pallas_kernels.tuning.aot`). The estimate is a
roofline: by the chip's published speeds a step takes at least as long as its operations, and as
writing and reading once what it keeps in memory meanwhile. Nothing is measured.
"""

import datetime
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.tuning import aot
from spak_jax import models, provenance, tasks
from spak_jax.config import Config
from spak_jax.config_sections import Parallel, StaticModel
from spak_jax.data import make_dataset
from spak_jax.training.step import initial_state, make_training

# Where XLA can try none of its own Triton products out, as on the GPU itself, it takes one unseen,
# and for some shapes (JAX 0.10.2: pointer's) finds none that compiles. All go to cuBLAS here.
LIBRARY_PRODUCTS = {"xla_gpu_enable_triton_gemm": False}


def operations_a_step(config: Config) -> int:
    """Floating-point operations of the products of one seed's training step.

    Those of a pass, and twice that backward; with the readouts that training supervises.
    """
    static = isinstance(config.model, StaticModel)
    depth = config.model.layers if static else config.model.loops
    readouts = 1 if static else depth - depth // 2
    return 3 * operations_a_pass(
        config, config.train.batch, config.data.row_length, depth, readouts
    )


def operations_a_pass(config: Config, rows: int, length: int, depth: int, readouts: int = 1) -> int:
    """Floating-point operations of the products of a forward pass.

    Two for each weight and token, as often as the weight is applied; scores and values of attention
    without what the mask cuts; the readouts.

    Args:
      config: of the model.
      rows, length: of its input, in tokens.
      depth: blocks that each token goes through.
      readouts: how many.
    """
    width, vocabulary = config.model.width, len(tasks.of(config.data).vocabulary)
    weights = depth * weights_of_a_block(config) + readouts * width * vocabulary
    pairs = depth * width * length
    return rows * length * (2 * weights + 2 * pairs)


def weights_of_a_block(config: Config) -> int:
    """In the matrices of one block."""
    architecture = config.model
    matrices = 3 if architecture.mlp == "swiglu" else 2
    hidden = matrices * models.hidden_width(architecture)
    return architecture.width * (4 * architecture.width + hidden)


def estimate(config: Config, target: str) -> dict[str, Any]:
    """Memory and least time of a training step on one GPU of a target, whatever `parallel` says.

    Args:
      config: of the training.
      target: a name in `targets.TARGETS`.

    Raises:
      aot.Unavailable: what compiling for another GPU needs is not installed.
    """
    aot.check_plugin()
    config = config.model_copy(update={"parallel": Parallel()})
    chip = targets.TARGETS[target]
    with targets.compiling_for(target):
        state = jax.eval_shape(lambda: initial_state(config))
        dataset = jax.eval_shape(lambda: make_dataset(config.data))
        count = jax.ShapeDtypeStruct((), jnp.int32)
        arguments = aot.placed((state, dataset, count), target)
        run_steps = jax.jit(make_training(config), donate_argnums=0)
        executable = run_steps.lower(*arguments).compile(compiler_options=LIBRARY_PRODUCTS)
    memory = executable.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # Memory is used again within a step, so more than this is moved.
    moved = 2 * memory.temp_size_in_bytes
    operations = config.train.seeds * operations_a_step(config)
    return {
        "estimate": True,
        "target": target,
        "chip": chip.chip,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "commit": provenance.commit(),
        "seeds": config.train.seeds,
        "bytes_held": held,
        "memory_bytes": chip.memory,
        "operations_a_step": operations,
        "least_bytes_moved_a_step": moved,
        "least_milliseconds_by_operations": 1e3 * operations / chip.products,
        "least_milliseconds_by_bytes": 1e3 * moved / chip.bandwidth,
    }
