"""What all models share: token embedding, final norm and tied head."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax.models.block import norm


class Network(Protocol):
    """What a configuration (`spak_jax.config_sections.Network`) says of any model."""

    width: int
    causal: bool
    init_std: float
    scale_embedding: bool
    dropout: float


class LanguageModel(nnx.Module):
    """Token embedding, final norm and a head whose weights are those of the embedding.

    Args:
      config: what all models are described by.
      vocabulary: number of different tokens.
      dtype: of the products.
      rngs: for initial values.
    """

    def __init__(self, config: Network, vocabulary: int, dtype: Any, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )
        self.final_norm = norm(config.width, dtype, rngs)
        self.config = config
        self.dropout = config.dropout
        self.dtype = dtype

    def unembed(self, x: jax.Array) -> jax.Array:
        """float32 logits `[..., vocabulary]` of a residual stream `[..., width]`."""
        return jnp.einsum(
            "...d,vd->...v",
            self.final_norm(x),
            self.unembedding(),
            preferred_element_type=jnp.float32,
        )

    def unembedding(self) -> jax.Array:
        """The token embedding, in the compute dtype: `[vocabulary, width]`."""
        return self.embedding.embedding[...].astype(self.dtype)

    def _embed_tokens(self, tokens):
        x = self.embedding(tokens)
        return x * self.config.width**0.5 if self.config.scale_embedding else x


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of one kind with weights of their own: one whose arrays have them along a
    first axis, as `jax.lax.scan` takes them.

    Args:
      make: gives one of them.
      count: of them.
      rngs: for initial values.
    """
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)
