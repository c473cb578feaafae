"""When a token of a looped block halts: two rules, each with a threshold for every token."""

import jax
import jax.numpy as jnp

# When a token halts: its largest probability has reached its threshold, or its state and those of
# all before it have moved in a loop by no more than that share of themselves.
RULES = ("confidence", "convergence")
# Thresholds of what is not waited for. No state moves by so many times its length.
AT_ONCE = {"confidence": 0.0, "convergence": 1e6}


def has_converged(moved: jax.Array, size: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Whether a state has moved by no more than a share of its length; never below a share of 0.

    moved, size: the squared lengths of its change and of itself.
    """
    return moved <= thresholds * jnp.abs(thresholds) * size
