"""A pre-norm transformer block, as its equations read.

    x = x + attention(norm1(x))
    x = x + mlp(norm2(x))

No bias anywhere; norms have a scale only. Weights and the residual stream are float32, products run
in the compute dtype. A block of your own is one more class, registered under a name:

    @BLOCKS.register("mine")
    class Mine(nnx.Module):
        def __init__(self, settings: BlockSettings, *, rngs: nnx.Rngs): ...
        def __call__(self, x, *, position_inputs, keys=None): ...   # the new x

or a subclass of `Block` with one equation changed (`examples/qk_norm.py`). It trains, resumes,
scores and writes as ours does. What `fused` and `kv_cache` know to do faster for `Block` itself
they do for no other class.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import attention, gelu
from pallas_kernels import dropout as counter_dropout
from pallas_kernels.ops import linear, reference
from pallas_kernels.ops.attention import reference as attention_reference
from spak_jax.positions.base import PositionInputs
from spak_jax.registry import BLOCKS

INIT_STD = 0.02
EPSILON = 1e-5
# A bias beside which the weight of a key is 0 in float32, while sums of scores stay finite.
UNSEEN = -1e9


@dataclass(frozen=True)
class BlockSettings:
    """What a block is built by.

    width, heads, hidden: channels of the stream, heads of attention, channels of the MLP. gated:
    whether the MLP is a SwiGLU. dropout: its rate. depth: blocks that add to one residual stream;
    their outputs start out smaller for it. dtype: of the products. window: differences of position
    ids beyond which keys are masked; None for no window. causal: whether tokens see those before
    them alone. init_std: standard deviation of the first weights. bias_table: that of the position
    scheme before training, float32 `[heads, 2 * max_relative_distance + 2]`; None for none.
    attention: an implementation, as `pallas_kernels.attention` takes it; None for the fastest.
    """

    width: int
    heads: int
    hidden: int
    gated: bool = False
    dropout: float = 0.0
    depth: int = 1
    dtype: Any = jnp.float32
    window: int | None = None
    causal: bool = True
    init_std: float = INIT_STD
    bias_table: jax.Array | None = None
    attention: str | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def output_std(self) -> float:
        """Standard deviation of the first weights of what is added to the stream."""
        return self.init_std / (2 * self.depth) ** 0.5


class Attention(nnx.Module):
    """Self-attention of several heads, with what a position scheme gives it."""

    def __init__(self, settings: BlockSettings, *, rngs: nnx.Rngs):
        self.heads = settings.heads
        self.dropout = settings.dropout
        self.dtype = settings.dtype
        self.window = settings.window
        self.causal = settings.causal
        self.attention_implementation = settings.attention
        width = settings.width
        self.qkv = matrix(width, 3 * width, settings.dtype, rngs, settings.init_std)
        self.attention_out = matrix(width, width, settings.dtype, rngs, settings.output_std)
        self.biased = settings.bias_table is not None
        if self.biased:
            self.bias_table = nnx.Param(settings.bias_table)

    def attend(
        self, x: jax.Array, *, position_inputs: PositionInputs, key: jax.Array | None = None
    ) -> jax.Array:
        """`concat_heads(softmax(q k^T / sqrt(head_dim) + bias) v) @ attention_out`.

        Args:
          x: the normed stream, `[batch, length, width]` in the compute dtype.
          position_inputs: of the tokens.
          key: PRNG key of the dropout of attention's probabilities; None for none.

        Returns:
          As x.
        """
        q, k, v = self.queries_keys_values(x)
        mixed = self.mix_heads(q=q, k=k, v=v, position_inputs=position_inputs, key=key)
        return self.project(mixed.reshape(x.shape), self.attention_out)

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`x @ qkv` by head, before any rotation: each `[batch, length, heads, head_dim]`."""
        qkv = self.project(x, self.qkv)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, x.shape[-1] // self.heads)
        return tuple(jnp.moveaxis(qkv, 2, 0))

    def mix_heads(
        self,
        q: jax.Array,
        k: jax.Array | None = None,
        v: jax.Array | None = None,
        *,
        position_inputs: PositionInputs,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What each head takes of the values, `[batch, length, heads, head_dim]`.

        q, k, v: or one array of all, as `pallas_kernels.attention` takes them. position_inputs,
        key: as of `attend`.
        """
        return attention(
            q,
            k,
            v,
            positions=position_inputs.rope_positions,
            ids=position_inputs.position_ids,
            bias_table=self._biases_of(position_inputs),
            window=self._window_of(position_inputs),
            dropout_rate=self.dropout,
            dropout_key=key,
            causal=self.causal,
            implementation=self.attention_implementation,
        )

    def weights_of_keys(
        self, q: jax.Array, k: jax.Array, *, position_inputs: PositionInputs
    ) -> jax.Array:
        """The probabilities of attention, float32 `[batch, heads, length, length]`, keys last.

        q, k: `[batch, length, heads, head_dim]`, before any rotation.
        """
        return attention_reference.attention_weights(
            q,
            k,
            positions=position_inputs.rope_positions,
            segment_ids=None,
            ids=position_inputs.position_ids,
            causal=self.causal,
            **self.scoring(position_inputs, q.shape[-1]),
        )

    def scoring(self, position_inputs: PositionInputs, head_dim: int) -> dict[str, Any]:
        """How `pallas_kernels.ops.attention.reference` is to score keys, positions apart."""
        biases = self._biases_of(position_inputs)
        return {
            "bias_table": biases,
            "window": self._window_of(position_inputs),
            "clip": self.window if biases is None else biases.shape[1] // 2 - 1,
            "scale": head_dim**-0.5,
        }

    def _biases_of(self, position_inputs: PositionInputs) -> jax.Array | None:
        """The bias table, as `pallas_kernels.attention` takes it."""
        if not self.biased:
            return None
        table, entries = self.bias_table[...], position_inputs.bias_entries
        if entries is None:
            return table
        return jnp.where(entries < 0, 0.0 if self.window is None else UNSEEN, table[:, entries])

    def _window_of(self, position_inputs: PositionInputs) -> int | jax.Array | None:
        """As `pallas_kernels.attention` takes it."""
        if position_inputs.bias_entries is not None:
            return None
        slack = position_inputs.window_slack
        return self.window if self.window is None or slack is None else self.window + slack

    def project(self, x: jax.Array, layer: nnx.Linear) -> jax.Array:
        """`x @ layer` in the compute dtype."""
        return linear.linear(x, layer.kernel[...], dtype=self.dtype)


class MLP(nnx.Module):
    """Two products around a GELU, or three and a gate (Shazeer 2020, GLU Variants)."""

    def __init__(self, settings: BlockSettings, *, rngs: nnx.Rngs):
        width, hidden, dtype = settings.width, settings.hidden, settings.dtype
        self.dtype = dtype
        self.gated = settings.gated
        self.mlp_in = matrix(width, hidden, dtype, rngs, settings.init_std)
        if self.gated:
            self.mlp_value = matrix(width, hidden, dtype, rngs, settings.init_std)
        self.mlp_out = matrix(hidden, width, dtype, rngs, settings.output_std)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """`gelu(x @ mlp_in) @ mlp_out`, or `(silu(x @ mlp_in) * (x @ mlp_value)) @ mlp_out`.

        Args:
          x: the normed stream, `[batch, length, width]` in the compute dtype.

        Returns:
          As x.
        """
        if self.gated:
            return self.mlp_out(jax.nn.silu(self.mlp_in(x)) * self.mlp_value(x))
        inner, outer = self.mlp_in.kernel[...], self.mlp_out.kernel[...]
        hidden = gelu(linear.linear(x, inner, dtype=self.dtype))
        return linear.linear(hidden, outer, dtype=self.dtype)


# The halves are bases, not parts: checkpoints store flat names (`block.qkv.kernel`), and the norm
# of all gradients is summed in the order of names.
@BLOCKS.register("transformer")
class Block(Attention, MLP):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, with dropout of what is added.

    Args:
      settings: sizes and the like.
      rngs: for initial values.
    """

    def __init__(self, settings: BlockSettings, *, rngs: nnx.Rngs):
        self.norm1 = norm(settings.width, settings.dtype, rngs)
        Attention.__init__(self, settings, rngs=rngs)
        self.norm2 = norm(settings.width, settings.dtype, rngs)
        MLP.__init__(self, settings, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, position_inputs: PositionInputs, keys: jax.Array | None = None
    ) -> jax.Array:
        """One block.

        Args:
          x: the residual stream, float32 `[batch, length, width]`.
          position_inputs: of the tokens.
          keys: three PRNG keys for dropout, `[3]`: of attention's probabilities, of what attention
            adds, of what the MLP adds; None for none.

        Returns:
          The stream behind the block, as x.
        """
        of_probabilities, of_attention, of_mlp = (None,) * 3 if keys is None else keys
        normed = layer_norm(x, self.norm1, self.dtype)
        # By name: `nnx.tabulate` shows no named tuple that holds nothing, beside other arguments.
        attended = self.attend(x=normed, position_inputs=position_inputs, key=of_probabilities)
        x = x + dropout(attended, self.dropout, of_attention)
        normed = layer_norm(x, self.norm2, self.dtype)
        return x + dropout(self.feed_forward(normed), self.dropout, of_mlp)

    def attention_weights(self, x: jax.Array, *, position_inputs: PositionInputs) -> jax.Array:
        """What each token takes of each other in this block, by head: to be looked at.

        A subclass for which this is still true says so with
        `attention_weights = Block.attention_weights`; of others no weights are shown.

        Args: as of a call. Returns: float32 `[batch, heads, length, length]`, keys last.
        """
        q, k, _ = self.queries_keys_values(layer_norm(x, self.norm1, self.dtype))
        return self.weights_of_keys(q, k, position_inputs=position_inputs)


def matrix(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, std: float) -> nnx.Linear:
    """A layer without a bias, its weights drawn from a normal distribution."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


def norm(width: int, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm with a scale alone."""
    return nnx.LayerNorm(width, epsilon=EPSILON, use_bias=False, dtype=dtype, rngs=rngs)


def layer_norm(x: jax.Array, norm: nnx.LayerNorm, dtype) -> jax.Array:
    """`(x - mean) / sqrt(variance + EPSILON) * scale`, in float32, given in `dtype`."""
    return reference.layer_norm(x, norm.scale[...], EPSILON).astype(dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share `rate` to zero and scales the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x
    return counter_dropout.dropout(x, rate, key)
