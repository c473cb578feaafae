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
from spak_jax import provenance
from spak_jax.config import Config
from spak_jax.config_sections import Parallel
from spak_jax.data import make_dataset
from spak_jax.models import flops
from spak_jax.training.step import initial_state, make_training

# Where XLA can try none of its own Triton products out, as on the GPU itself, it takes one unseen,
# and for some shapes (JAX 0.10.2: pointer's) finds none that compiles. All go to cuBLAS here.
LIBRARY_PRODUCTS = {"xla_gpu_enable_triton_gemm": False}


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
    operations = config.train.seeds * flops.operations_a_step(config)
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
