"""Kernels for the transformers of `spak_jax`, each beside the plain `jnp` truth it must equal."""

from pallas_kernels.activation import gelu as gelu
from pallas_kernels.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.dispatch import Choice as Choice
from pallas_kernels.dispatch import attention as attention
from pallas_kernels.dispatch import choose as choose
from pallas_kernels.looped import looped_block as looped_block
from pallas_kernels.readout import add_and_score as add_and_score
from pallas_kernels.residual import add_and_norm as add_and_norm
