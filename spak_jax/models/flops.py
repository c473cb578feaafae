"""Floating-point operations (FLOP) of a model's passes and of its training, counted, not measured.

What is counted are products, two operations for a multiplication and its addition:

    weights       2 a token for each weight of a matrix, as often as it is applied
    attention     4 * width * row length a token and block, for scores and values; half of it where
                  a mask cuts the later half of each row, whatever a window cuts besides
    readouts      2 * width * vocabulary a token, and as much again where they are fed back
    training      3 times a pass, the way back being two (Kaplan et al. 2020, arXiv 2001.08361)

Lookups of embeddings, norms, gates, activations, softmax and the optimizer are not: a few percent
of a wide model. Loops are those that are run: in training the mean of those without a gradient too,
which cost a pass alone; at test time those of the problem.
"""

import functools

import jax

from spak_jax import models, tasks
from spak_jax.config import Config
from spak_jax.config_sections import Architecture, LoopedModel


def operations_a_step(config: Config) -> int:
    """FLOP of one seed's training step, with the readouts that training supervises."""
    model, rows, length = config.model, config.train.batch, config.data.row_length
    depth, readouts, warmup = model.depth(), 1, 0.0
    if isinstance(model, LoopedModel):
        readouts = model.supervised_loops or depth - depth // 2
        # From none to all of them, each number as often as another.
        warmup = model.no_grad_warmup_loops / 2
    forwards = operations_a_pass(config, rows, length, warmup, readouts=0)
    return forwards + 3 * operations_a_pass(config, rows, length, depth, readouts)


def operations_a_problem(config: Config, length: int, depth: float | None = None) -> int:
    """FLOP of answering one problem: a pass over its text, all that is written included.

    Symbol by symbol with a cache comes to as much; a pass for each symbol is not counted.

    Args:
      config: of the model and its task.
      length: of the problem, as the task measures it.
      depth: blocks, loops or layers that its tokens go through, also a mean; None for as many as in
        training.
    """
    depth = config.model.depth() if depth is None else depth
    return operations_a_pass(config, 1, tasks.of(config.data).row_length(length), depth)


def operations_a_pass(
    config: Config, rows: int, length: int, depth: float, readouts: int = 1
) -> int:
    """FLOP of a forward pass.

    Args:
      config: of the model.
      rows, length: of its input, in tokens.
      depth: blocks, loops or layers that each token goes through, also a mean.
      readouts: how many.
    """
    model, vocabulary = config.model, len(tasks.of(config.data).vocabulary)
    of_layer = 2 * weights_of_a_layer(config)
    if isinstance(model, Architecture):
        of_layer += (2 if model.causal else 4) * model.width * length
    if isinstance(model, LoopedModel) and model.answer_feedback:
        of_layer += 4 * model.width * vocabulary
    return round(rows * length * (depth * of_layer + 2 * readouts * model.width * vocabulary))


def weights_of_a_layer(config: Config) -> int:
    """In the matrices of one block or layer, of whatever class: its kernels.

    Those of the layers of one model are as large.
    """
    layers = 1 if isinstance(config.model, LoopedModel) else config.model.depth()
    return _weights_of_kernels(config.model_only()) // layers


@functools.cache
def _weights_of_kernels(config: Config) -> int:
    _, weights = models.abstract(config)
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    # Some versions of Flax show a variable's value as a level of its own.
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    kernels = (name.removesuffix(".value").endswith("kernel") for name in names)
    return sum(leaf.size for (_, leaf), one in zip(leaves, kernels, strict=True) if one)
