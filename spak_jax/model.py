"""The two models as Flax NNX modules: GPT, which stacks blocks, and LoopLM, which repeats one.

What is unusual here:
- `GPT` is one `lax.scan` over the stacked weights of its blocks, `LoopLM` one over the loops of a
  single block. On a CPU both compile one block whatever the depth; on a GPU, where the scan would
  copy what it keeps for the backward pass, blocks stand one after another.
- A block leaves its last addition to the stream to whoever reads the stream next: addition,
  dropout and the norm behind them are one kernel.
- Where tokens are is one of several named schemes (`positions`).
- LoopLM adds a learned step embedding before each loop, and its training loss reads out every
  loop of the second half, not the last alone.
- No bias anywhere; LayerNorm with scale only; the token embedding is also the output head.
- Weights and the residual stream are float32; products run in the compute dtype.
- Dropout keys are arguments: a call without one is deterministic.
- Halting runs the loops of the model that was trained, position information included, and only
  freezes what has been decided.
- On a GPU, short rows of narrow models go through all loops of inference in one launch
  (`pallas_kernels.ops.looped`), and training makes the gradients of all blocks' matrices in one
  launch each (`pallas_kernels.ops.linear`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import (
    add_layer_norm,
    add_layer_norm_cross_entropy,
    attention,
    derivatives,
    looped_block,
    targets,
)
from pallas_kernels import dropout as counter_dropout
from pallas_kernels.ops import linear, looped, reference
from pallas_kernels.ops.attention import reference as attention_reference
from pallas_kernels.ops.attention import rope
from pallas_kernels.ops.linear import DeferredWeightGrad
from spak_jax import tasks
from spak_jax.config import BIASED, Architecture, Config, LoopedModel, StaticModel
from spak_jax.positions import (
    EMBEDDED_IDS,
    Places,
    Pointer,
    first_bias,
    learned_places,
    offset_ids,
    places,
)

INIT_STD = 0.02
EPSILON = 1e-5


class BlockOperands(NamedTuple):
    """Of the gradients of a block's matrices, as `Block.matrices` gives these."""

    qkv: DeferredWeightGrad
    attention_out: DeferredWeightGrad
    mlp_in: DeferredWeightGrad
    mlp_out: DeferredWeightGrad


class Seen(NamedTuple):
    """What later tokens see of a text: of every block, or loop, the keys, turned, and the values.

    Both in the compute dtype, `[depth, batch, length, heads, head_dim]`.
    """

    keys: jax.Array
    values: jax.Array


class Block(nnx.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Args:
      config: width, heads, MLP kind, dropout.
      depth: blocks that add to one residual stream; their outputs start out smaller for it.
      dtype: of the products.
      attention: implementation, as `pallas_kernels.attention` takes it.
    """

    def __init__(
        self,
        config: Architecture,
        depth: int,
        dtype: jnp.dtype,
        attention: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.dtype = dtype
        self.attention = attention

        def layer(inputs, outputs, std=INIT_STD):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                kernel_init=nnx.initializers.normal(std),
                rngs=rngs,
            )

        residual_std = INIT_STD / (2 * depth) ** 0.5
        self.norm1 = _norm(width, dtype, rngs)
        self.qkv = layer(width, 3 * width)
        self.attention_out = layer(width, width, residual_std)
        self.norm2 = _norm(width, dtype, rngs)
        self.gated = config.mlp == "swiglu"
        hidden = hidden_width(config)
        self.mlp_in = layer(width, hidden)
        if self.gated:
            self.mlp_value = layer(width, hidden)
        self.mlp_out = layer(hidden, width, residual_std)
        self.window = config.clip if config.window else None
        bias = first_bias(config)
        if bias is not None:
            self.bias_table = nnx.Param(bias)

    def __call__(
        self,
        x: jax.Array,
        update: jax.Array | None,
        where: Places,
        key: jax.Array | None = None,
        shift: jax.Array | None = None,
        operands: BlockOperands | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One block; what it adds last is left to whoever reads the stream next.

        Adding, dropout, the shift and the norm that follows them are one kernel.

        Args:
          x: the residual stream, float32 `[batch, length, width]`.
          update: what is still to be added to it, in the compute dtype; None for nothing.
          where: the tokens are.
          key: three PRNG keys, the first for the dropout of `update`; None is deterministic.
          shift: float32 `[width]`, added to every token first.
          operands: asks for those of its matrices' gradients instead of the gradients (`linear`).

        Returns:
          The stream, and what is still to be added to it.
        """
        batch, length, width = x.shape
        keys = (None, None, None) if key is None else key
        x, normed = self._add_and_norm(x, update, self.norm1, keys[0], shift)
        qkv = self._linear(normed, self.qkv, operands and operands.qkv)
        mixed = attention(
            qkv.reshape(batch, length, 3, self.heads, width // self.heads),
            positions=where.turned_by,
            ids=where.ids,
            bias_table=self.bias_table[...] if hasattr(self, "bias_table") else None,
            window=self._window(where),
            dropout_rate=self.dropout,
            dropout_key=keys[1],
            implementation=self.attention,
        )
        mixed = mixed.reshape(batch, length, width)
        mixed = self._linear(mixed, self.attention_out, operands and operands.attention_out)
        x, normed = self._add_and_norm(x, mixed, self.norm2, keys[2])
        return x, self._mlp(normed, operands and operands[2:])

    def no_operands(self, tokens: int) -> BlockOperands | None:
        """What to ask for operands with, for so many tokens; None where there is nothing to ask."""
        sizes = [matrix.shape[-2:] for matrix in self.matrices()]
        if self.gated or not all(linear.supports(tokens, *size, self.dtype) for size in sizes):
            return None
        return BlockOperands(
            *(linear.DeferredWeightGrad.zeros(tokens, *size, self.dtype) for size in sizes)
        )

    def add_gradients(self, operands: list[BlockOperands]) -> None:
        """To this block, whose weights are gradients, adds those that are still to be made.

        operands: of each loop; of a stack, whose matrices have an axis for them, of each layer.
        """
        for matrix, pairs in zip(self.matrices(), zip(*operands, strict=True), strict=True):
            matrix[...] += linear.weight_grads(pairs).sum((0, 1) if matrix.ndim == 2 else 1)

    def matrices(self) -> tuple[nnx.Param, ...]:
        """Those that every kind of block has."""
        layers = self.qkv, self.attention_out, self.mlp_in, self.mlp_out
        return tuple(layer.kernel for layer in layers)

    def keys_and_values(self, x, update, where: Places, shift=None) -> tuple[jax.Array, jax.Array]:
        """What later tokens see of these in this block.

        Args: as of a call. Returns: keys, turned, and values, `[batch, length, heads, head_dim]`.
        """
        _, _, k, v = self._projected(x, update, shift)
        return (k if where.turned_by is None else rope.apply_rope(k, where.turned_by)), v

    def newest(
        self, x, update, where: Places, at: jax.Array, seen: Seen, depth: jax.Array, shift=None
    ) -> tuple[jax.Array, jax.Array, Seen]:
        """A call for one token of each row, by what is known of those before it.

        Args:
          x, update, shift: as of a call, of one token: `[batch, 1, width]`.
          where: of whole rows, as of a call.
          at: int32 `[batch]`, the token's place in its row.
          seen: of whole rows, at all depths.
          depth: int32, which of them this is.

        Returns:
          What a call gives, and `seen` with the token's own at its place.
        """
        batch, _, width = x.shape
        x, q, k, v = self._projected(x, update, shift)
        if where.turned_by is not None:
            by = jnp.broadcast_to(where.turned_by, (batch, where.turned_by.shape[-1]))
            by = jnp.take_along_axis(by, at[:, None], axis=1)
            q, k = rope.apply_rope(q, by), rope.apply_rope(k, by)
        place = depth, jnp.arange(batch), at
        seen = Seen(seen.keys.at[place].set(k[:, 0]), seen.values.at[place].set(v[:, 0]))
        mixed = attention_reference.decode_attention(
            q[:, 0], seen.keys[depth], seen.values[depth], at,
            ids=where.ids, **self._told(where, q),
        )  # fmt: skip
        mixed = self._linear(mixed.reshape(batch, 1, width), self.attention_out)
        x, normed = self._add_and_norm(x, mixed, self.norm2, None)
        return x, self._mlp(normed), seen

    def attention_weights(self, x, update, where: Places, shift=None) -> jax.Array:
        """What each token takes of each other in this block, by head: to be looked at.

        Args: as of a call. Returns: float32 `[batch, heads, length, length]`, keys last.
        """
        _, q, k, _ = self._projected(x, update, shift)
        return attention_reference.attention_weights(
            q,
            k,
            positions=where.turned_by,
            segment_ids=None,
            ids=where.ids,
            causal=True,
            **self._told(where, q),
        )

    def _projected(self, x, update, shift):
        """The stream, and queries, keys and values, `[batch, length, heads, head_dim]`."""
        x, normed = self._add_and_norm(x, update, self.norm1, None, shift)
        qkv = self._linear(normed, self.qkv)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, x.shape[-1] // self.heads)
        return x, *jnp.moveaxis(qkv, 2, 0)

    def _told(self, where: Places, q: jax.Array) -> dict:
        """What the plain attention of `reference` is told beside places."""
        bias = self.bias_table[...] if hasattr(self, "bias_table") else None
        return {
            "bias_table": bias,
            "window": self._window(where),
            "clip": self.window if bias is None else bias.shape[1] // 2 - 1,
            "scale": q.shape[-1] ** -0.5,
        }

    def _window(self, where: Places):
        """As `pallas_kernels.attention` takes it."""
        further = self.window is not None and where.further is not None
        return self.window + where.further if further else self.window

    def _add_and_norm(self, x, update, norm: nnx.LayerNorm, key, shift=None):
        return add_layer_norm(
            x,
            update,
            norm.scale[...],
            shift=shift,
            dropout_rate=self.dropout,
            dropout_key=key,
            dtype=self.dtype,
        )

    def _linear(self, x, layer: nnx.Linear, operands: DeferredWeightGrad | None = None):
        return linear.linear(x, layer.kernel[...], dtype=self.dtype, deferred=operands)

    def _mlp(self, x, operands: tuple[DeferredWeightGrad, DeferredWeightGrad] | None = None):
        if self.gated:
            return self.mlp_out(jax.nn.silu(self.mlp_in(x)) * self.mlp_value(x))
        inner, outer = self.mlp_in.kernel[...], self.mlp_out.kernel[...]
        return linear.mlp(x, inner, outer, dtype=self.dtype, deferred=operands)


class _Transformer(nnx.Module):
    """Token embedding, final norm and tied head, which both models share."""

    def __init__(self, config: Architecture, vocabulary: int, dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(INIT_STD),
            rngs=rngs,
        )
        self.final_norm = _norm(config.width, dtype, rngs)
        self.config = config
        self.dropout = config.dropout
        self.dtype = dtype
        if config.positions == "coupled-embedding":
            self.id_embedding = nnx.Embed(
                EMBEDDED_IDS,
                config.width,
                embedding_init=nnx.initializers.normal(INIT_STD),
                rngs=rngs,
            )
        if config.positions == "learned":
            self.pointer = Pointer(vocabulary)

    def readout(self, state: jax.Array) -> jax.Array:
        """float32 logits `[..., vocabulary]` of a residual stream `[..., width]`."""
        return jnp.einsum(
            "...d,vd->...v",
            self.final_norm(state),
            self._head(),
            preferred_element_type=jnp.float32,
        )

    def _head(self):
        return self.embedding.embedding[...].astype(self.dtype)

    def remember(
        self,
        tokens: jax.Array,
        thresholds: jax.Array | None = None,
        *,
        loops: int | None = None,
        ids: jax.Array | None = None,
    ) -> Seen:
        """What tokens behind these will see of them: where `continued` begins.

        Args:
          tokens: int `[batch, length]`.
          thresholds: where tokens halt once they are sure, as `LoopLM.halting_logits` takes them.
          loops: of a model that loops; None for as many as in training.
          ids: as in a plain call.
        """
        (x, _), where, _ = self._embed(tokens, None, ids, None, 0)
        enter, given = self._inference(x, loops)

        def step(carry, given):
            block, entered, shift = enter(carry[0], given)
            seen = block.keys_and_values(*entered, where=where, shift=shift)
            stream = block(*entered, where=where, shift=shift)
            return self._thought(carry, self._whole(stream, None), thresholds), seen

        return Seen(*jax.lax.scan(step, self._unthought(x), given)[1])

    def continued(
        self,
        tokens: jax.Array,
        at: jax.Array,
        seen: Seen,
        thresholds: jax.Array | None = None,
        *,
        ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Seen]:
        """Next-token logits of one token of each row: a pass over it alone.

        As a call, or `LoopLM.halting_logits`, over the whole rows gives them: no token's place
        depends on what stands behind it, in any scheme.

        Args:
          tokens: int `[batch, length]`; what stands behind `at` is not looked at.
          at: int32 `[batch]`, the token's place in its row.
          seen: of all tokens before it.
          thresholds: float, broadcastable to `[batch, length]`.
          ids: as in a plain call, of the whole rows.

        Returns:
          float32 logits `[batch, vocabulary]`, the int32 number of blocks that the token took,
          `[batch]`, and what is seen of it and all before it.
        """
        at_place = lambda of_row: jnp.take_along_axis(  # noqa: E731
            jnp.broadcast_to(of_row, tokens.shape), at[:, None], axis=1
        )
        where = self._where(tokens, None, ids, None, None)
        x = self._embedded(at_place(tokens), None if ids is None else at_place(ids), None)
        thresholds = None if thresholds is None else at_place(thresholds)
        depths = len(seen.keys)
        enter, given = self._inference(x, depths)

        def step(carry, given):
            carry, seen = carry
            depth, given = given
            block, entered, shift = enter(carry[0], given)
            *stream, seen = block.newest(
                *entered, where=where, at=at, seen=seen, depth=depth, shift=shift
            )
            return (self._thought(carry, self._whole(stream, None), thresholds), seen), None

        carry = self._unthought(x), seen
        ((x, _, steps), seen), _ = jax.lax.scan(step, carry, (jnp.arange(depths), given))
        return self.readout(x)[:, 0], steps[:, 0], seen

    def _unthought(self, x):
        """Of tokens before the first block: stream, whether they have halted, blocks they took."""
        nothing = jnp.zeros(x.shape[:-1], bool)
        return x, nothing, nothing.astype(jnp.int32)

    def _thought(self, carry, new, thresholds, rule="confidence"):
        """The same after one more block, which made the stream `new`: see `halting_logits`."""
        x, halted, steps = carry
        if thresholds is None:
            return new, halted, steps + 1
        new = jnp.where(halted[..., None], x, new)
        if rule == "confidence":
            halts = jax.nn.softmax(self.readout(new)).max(-1) >= thresholds
        else:
            moved, size = ((v * v).sum(-1) for v in (new - x, new))
            settled = looped.has_converged(moved, size, thresholds)
            halts = jax.lax.cummin(settled.astype(jnp.int32), axis=1) > 0
        return new, halted | halts, steps + ~halted

    def _embedded(self, tokens, ids, key):
        embedded = self.embedding(tokens)
        if self.config.positions == "coupled-embedding":
            offset_key = None if key is None else jax.random.fold_in(key, 0)
            embedded += self.id_embedding(offset_ids(ids, offset_key))
        return embedded

    def _where(self, tokens, positions, ids, key, progress):
        if self.config.positions == "learned":
            return learned_places(self.pointer, tokens, progress)
        places_key = None if key is None else jax.random.fold_in(key, 2)
        return places(self.config, tokens, positions, ids, places_key)

    def _embed(self, tokens, positions, ids, key, depth, progress=None):
        """The stream and update before the first block, places, and keys of `depth` blocks.

        Of the keys, the first are those that each block takes, `[depth, 3]`, the second what drops
        each block's update where it is read, `[depth]`.
        """
        embedded = self._embedded(tokens, ids, key)
        where = self._where(tokens, positions, ids, key, progress)
        first, keys = None, (None, None)
        if key is not None:
            first, rest = jax.random.split(key)
            rest = jax.random.split(rest, (depth + 1, 3))
            keys = rest[:-1], rest[1:, 0]
        x = dropout(embedded, self.dropout, first)
        return (x, jnp.zeros(x.shape, self.dtype)), where, keys

    def _scored(self, stream, key, targets, weights):
        """As `_whole`, and the weighted sum of its tokens' cross-entropies."""
        return add_layer_norm_cross_entropy(
            *stream,
            self.final_norm.scale[...],
            self._head(),
            targets,
            weights,
            dropout_rate=self.dropout,
            dropout_key=key,
        )

    def _gradients_at_once(self, name: str, depth: int, tokens, given):
        """`self._losses(tokens, *given)`, whose gradient makes those of all blocks' matrices in one
        launch each, where kernels are for the batch.

        The blocks are the attribute `name`, gone through `depth` times.
        """
        if getattr(self, name).no_operands(tokens.size) is None:
            return self._losses(tokens, *given)
        definition, weights = nnx.split(self)

        def losses(weights, given, _):
            return nnx.merge(definition, weights)._losses(*given)

        def forward(weights, given, _):
            none = getattr(nnx.merge(definition, weights), name).no_operands(tokens.size)

            def asking(weights, operands):
                return nnx.merge(definition, weights)._losses(*given, operands)

            return jax.vjp(asking, weights, [none] * depth)

        def backward(weights, given, pull, d_losses, _):
            d_weights, operands = pull(d_losses)
            gradients = nnx.merge(definition, d_weights)
            getattr(gradients, name).add_gradients(operands)
            return nnx.state(gradients)

        # Derivatives of other kinds are those of the same losses, a matrix at a time.
        derived = derivatives.differentiable(losses, losses, gradient=(forward, backward))
        return derived(weights, (tokens, *given), None)

    def _whole(self, stream, key):
        """The stream with what was still to be added to it."""
        x, update = stream
        return x if update is None else x + dropout(update, self.dropout, key)


class GPT(_Transformer):
    """A transformer of `config.layers` blocks with weights of their own."""

    def __init__(
        self, config: StaticModel, vocabulary: int, dtype, attention: str | None, *, rngs: nnx.Rngs
    ):
        super().__init__(config, vocabulary, dtype, rngs)
        self.layers = config.layers

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked_blocks(rngs):
            return Block(config, config.layers, dtype, attention, rngs=rngs)

        self.blocks = stacked_blocks(rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
          tokens: int `[batch, length]`.
          positions: int `[length]` or `[batch, length]`; None counts from 0.
          ids: int32 `[batch, length]`, coupled ids, for the schemes that go by them.
          key: PRNG key for dropout; None is deterministic.

        Returns:
          float32 `[batch, length, vocabulary]`.
        """
        return self.readout(self._whole(*self._run(tokens, positions, ids, key)))

    def supervised_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        ids: jax.Array | None = None,
        key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """What the training loss averages over: float32 `[1]`, of the one readout.

        The cross-entropies of `targets`, int32 `[batch, length]`, summed with `weights`, float32
        `[batch, length]`; `progress`, the share of the training that is done, which learned ids go
        by; the rest as in a plain call.
        """
        given = targets, weights, ids, key, progress
        return self._gradients_at_once("blocks", self.layers, tokens, given)

    def _losses(self, tokens, targets, weights, ids, key, progress, operands=None):
        """`supervised_losses`, and operands as of a block, of each layer."""
        stream, after = self._run(tokens, None, ids, key, progress, operands)
        return self._scored(stream, after, targets, weights)[1][None]

    def _run(self, tokens, positions, ids, key, progress=None, operands=None):
        """The stream after all blocks, and the key for what is still to be added to it."""
        stream, where, (keys, after) = self._embed(
            tokens, positions, ids, key, self.layers, progress
        )
        definition, weights = nnx.split(self.blocks)

        def step(stream, layer, operands):
            block = nnx.merge(definition, layer[0])
            x, update = stream
            # By name, since `nnx.tabulate` shows no named tuple that has none.
            told = {"update": update, "where": where, "key": layer[1], "operands": operands}
            return block(x, **told), None

        stream, _ = _in_turn(step, stream, (weights, keys), operands)
        return stream, None if after is None else after[-1]

    def _inference(self, first, loops):
        """As of `LoopLM`; there are no loops to choose."""
        definition, weights = nnx.split(self.blocks)
        return lambda x, layer: (nnx.merge(definition, layer), (x, None), None), weights


class LoopLM(_Transformer):
    """One block applied `config.loops` times, or as often as a call asks for."""

    def __init__(
        self, config: LoopedModel, vocabulary: int, dtype, attention: str | None, *, rngs: nnx.Rngs
    ):
        super().__init__(config, vocabulary, dtype, rngs)
        self.loops = config.loops
        self.block = Block(config, 1, dtype, attention, rngs=rngs)
        self.steps = 1 if config.shared_step else config.loops
        self.step_embedding = nnx.Embed(
            self.steps,
            config.width,
            embedding_init=nnx.initializers.normal(INIT_STD),
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        loops: int | None = None,
        positions: jax.Array | None = None,
        ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits after the last loop.

        Args:
          tokens: int `[batch, length]`.
          loops: None for as many as in training; beyond those the last step embedding repeats.
          positions: int `[length]` or `[batch, length]`; None counts from 0.
          ids: int32 `[batch, length]`, coupled ids, for the schemes that go by them.
          key: PRNG key for dropout; None is deterministic.

        Returns:
          float32 `[batch, length, vocabulary]`.
        """
        if key is None and self._fits_one_launch(tokens):
            return self.launched(tokens, loops=loops, positions=positions, ids=ids)[0]
        step, stream, inputs = self._loop(tokens, loops, positions, ids, key)
        stream, after = jax.lax.scan(step, stream, inputs)
        return self.readout(self._whole(stream, None if after is None else after[-1]))

    def supervised_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        ids: jax.Array | None = None,
        key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """What the training loss averages over: a sum for every loop of the second half.

        With `config.free_loops` and a key, the state has gone through a random number of loops
        before, which the gradient does not go back through (as Bansal et al. 2022 train networks
        to think longer, End-to-end Algorithm Synthesis with Recurrent Networks): so the loops that
        count are not always the first ones.

        Args:
          tokens: int `[batch, length]`.
          targets: int `[batch, length]`, the right next tokens.
          weights: float32 `[batch, length]`, of their cross-entropies.
          ids: as in a plain call.
          key: PRNG key for dropout; None is deterministic.
          progress: share of the training that is done, which learned ids go by; None outside it.

        Returns:
          float32 `[loops - loops // 2]`: weighted sums of the cross-entropies.
        """
        given = targets, weights, ids, key, progress
        return self._gradients_at_once("block", self.loops, tokens, given)

    def _losses(self, tokens, targets, weights, ids, key, progress, operands=None):
        """`supervised_losses`, and operands as of a block, of each loop."""
        step, stream, inputs = self._loop(tokens, None, None, ids, key, progress)
        if self.config.free_loops and key is not None:
            stream = self._after_free_loops(stream, tokens, ids, key, progress)
        half = self.loops // 2

        def scored(x, given, operands):
            stream, after = step((x, None), given, operands)
            return self._scored(stream, after, targets, weights)

        first = jax.tree.map(lambda x: x[:half], inputs)
        second = jax.tree.map(lambda x: x[half:], inputs)
        early, late = (None, None) if operands is None else (operands[:half], operands[half:])
        stream, after = _in_turn(step, stream, first, early)
        # Before the first loop nothing is left to be added, and no key to drop it by.
        x = self._whole(stream, after[-1] if half and key is not None else None)
        return _in_turn(scored, x, second, late)[1]

    def _after_free_loops(self, stream, tokens, ids, key, progress):
        """The stream after a random number of loops, without a gradient unless there is none."""
        definition, weights = nnx.split(self)
        # A loop whose length is not known cannot be gone back through: nothing may ask for it.
        fixed = nnx.merge(definition, jax.lax.stop_gradient(weights))
        step, first, inputs = fixed._loop(tokens, 1, None, ids, key, progress)
        shift, (keys, after) = jax.tree.map(lambda x: x[0], inputs)

        def one(i, stream):
            fresh = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            return step(stream, (shift, (fresh, after)))[0]

        count = jax.random.randint(jax.random.fold_in(key, 1), (), 0, self.config.free_loops + 1)
        moved = jax.lax.fori_loop(0, count, one, first)
        return jax.tree.map(lambda x, y: jnp.where(count > 0, x, y), moved, stream)

    def halting_logits(
        self,
        tokens: jax.Array,
        thresholds: jax.Array,
        *,
        rule: str = "confidence",
        loops: int | None = None,
        positions: jax.Array | None = None,
        ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits where each token stops once it has thought enough ("wait to think").

        A token that halts after a loop keeps that loop's state from then on; the tokens that go on
        still attend to it. By the rule "confidence" it halts when its largest probability reaches
        its threshold; by the rule "convergence", when its state has moved in the loop, as a share
        of the length that it has now, by no more than its threshold, as have those of all tokens
        before it. Without these, it would halt before what it looks at has come to rest.

        Args:
          tokens: int `[batch, length]`.
          thresholds: float, broadcastable to `[batch, length]`; a probability above 1, or a share
            below 0, never halts.
          rule: of `pallas_kernels.ops.looped.RULES`.
          loops: the most loops to run; None for as many as in training.
          positions, ids: as in a plain call.

        Returns:
          float32 logits `[batch, length, vocabulary]` and the int32 number of loops that each
          token took, `[batch, length]`.
        """
        if self._fits_one_launch(tokens):
            return self.launched(
                tokens, thresholds, rule=rule, loops=loops, positions=positions, ids=ids
            )
        (x, _), where, _ = self._embed(tokens, positions, ids, None, 0)
        enter, given = self._inference(x, loops)

        def step(carry, given):
            block, entered, shift = enter(carry[0], given)
            stream = block(*entered, where=where, shift=shift)
            return self._thought(carry, self._whole(stream, None), thresholds, rule), None

        (x, _, steps), _ = jax.lax.scan(step, self._unthought(x), given)
        return self.readout(x), steps

    def launched(
        self,
        tokens: jax.Array,
        thresholds: jax.Array | None = None,
        *,
        rule: str = "confidence",
        loops: int | None = None,
        positions: jax.Array | None = None,
        ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `halting_logits`, and without thresholds as a plain call, in one launch.

        Raises:
          ValueError: `pallas_kernels.looped_block` does not hold such rows.
        """
        (x, _), where, _ = self._embed(tokens, positions, ids, None, 0)
        block, whole = self.block, lambda linear: linear.kernel[...]
        weights = looped.Weights(
            norm1=block.norm1.scale[...],
            qkv=whole(block.qkv),
            attention_out=whole(block.attention_out),
            norm2=block.norm2.scale[...],
            mlp_in=whole(block.mlp_in),
            mlp_out=whole(block.mlp_out),
            final_norm=self.final_norm.scale[...],
            head=self.embedding.embedding[...],
            steps=self.step_embedding.embedding[...],
            mlp_value=whole(block.mlp_value) if block.gated else None,
            bias_table=block.bias_table[...] if hasattr(block, "bias_table") else None,
        )
        return looped_block(
            x,
            weights,
            heads=block.heads,
            loops=self.loops if loops is None else loops,
            dtype=self.dtype,
            positions=where.turned_by,
            ids=where.ids,
            window=block.window,
            thresholds=thresholds,
            rule=rule,
            inject_input=self.config.inject_input,
            normalize_state=self.config.normalize_state,
            implementation="pallas",
        )

    def fits_one_launch(self, tokens: jax.Array) -> bool:
        """Whether inference takes one launch for such rows: where a program holds them, which is
        then the fastest (`benchmarks.models --inference`). Asked for an implementation of
        attention, the model runs its loops one by one."""
        return self._fits_one_launch(tokens)

    def _fits_one_launch(self, tokens) -> bool:
        # Private, since `nnx.tabulate` traces what public methods give.
        config, block = self.config, self.block
        return block.attention is None and looped.supports_fused(
            tokens.shape[1],
            config.width,
            config.heads,
            len(self._head()),
            self.dtype,
            with_ids=config.positions in BIASED,
        )

    def traced(
        self, tokens: jax.Array, *, loops: int | None = None, ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What every loop reads out and where it looks, to see how an answer comes about.

        Args:
          tokens, loops, ids: as in a plain call.

        Returns:
          float32 logits `[loops, batch, length, vocabulary]` and weights of attention
          `[loops, batch, heads, length, length]`, keys last.
        """
        (x, _), where, _ = self._embed(tokens, None, ids, None, 0)
        enter, given = self._inference(x, loops)

        def one(x, given):
            block, entered, shift = enter(x, given)
            looked = block.attention_weights(*entered, where=where, shift=shift)
            x = self._whole(block(*entered, where=where, shift=shift), None)
            return x, (self.readout(x), looked)

        return jax.lax.scan(one, x, given)[1]

    def _loop(self, tokens, loops, positions, ids, key, progress=None):
        """One loop as a scan's step over the stream, the first stream, and what each loop is given.

        With the stream, the step gives the key for the dropout of what is still to be added to it.
        """
        loops = self.loops if loops is None else loops
        stream, where, keys = self._embed(tokens, positions, ids, key, loops, progress)
        first = stream[0]
        definition, weights = nnx.split(self.block)

        def step(stream, given, operands=None):
            shift, (key, after) = given
            block = nnx.merge(definition, weights)
            entered = self._enter(stream, first, key)
            # By name: as in `GPT._run`.
            told = {"where": where, "key": key, "shift": shift, "operands": operands}
            return block(*entered, **told), after

        return step, stream, (self._steps(loops), keys)

    def _inference(self, first, loops):
        """How a stream goes through the model block by block.

        Args:
          first: the embedded input.
          loops: None for as many as in training.

        Returns:
          A function of a whole stream and what a block is given, and what all are given: it gives
          the block, the stream as that takes it, in two parts, and the shift.
        """
        definition, weights = nnx.split(self.block)

        def enter(x, shift):
            return nnx.merge(definition, weights), self._enter((x, None), first, None), shift

        return enter, self._steps(loops)

    def _steps(self, loops):
        """The step embedding of each loop, float32 `[loops, width]`."""
        index = jnp.arange(self.loops if loops is None else loops)
        return self.step_embedding(jnp.minimum(index, self.steps - 1))

    def _enter(self, stream, first, key):
        """The stream as a loop's block takes it, and what is still to be added to it.

        first: the embedded input. key: of the loop's block.
        """
        x, update = stream
        if self.config.normalize_state:
            whole = self._whole(stream, None if key is None else key[0])
            x, update = reference.layer_norm(whole, 1.0, EPSILON), None
        return (x + first if self.config.inject_input else x), update


def build(config: Config, key: jax.Array, attention: str | None = None) -> GPT | LoopLM:
    """The model that a configuration describes, freshly initialised from a PRNG key.

    `attention` is the implementation, as `pallas_kernels.attention` takes it; None the fastest.
    """
    architecture = config.model
    kind = GPT if isinstance(architecture, StaticModel) else LoopLM
    dtype, vocabulary = compute_dtype(architecture.dtype), len(tasks.of(config.data).vocabulary)
    return kind(architecture, vocabulary, dtype, attention, rngs=nnx.Rngs(key))


def abstract(config: Config, attention: str | None = None):
    """The structure of a configuration's model and its weights as shapes: nothing is computed.

    Returns:
      What `nnx.merge` makes a model from: graph definition, and state of `ShapeDtypeStruct`.
    """
    return nnx.split(nnx.eval_shape(lambda: build(config, jax.random.key(0), attention)))


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of products: "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if targets.on_gpu() else "float32"
    return jnp.dtype(name)


def hidden_width(config: Architecture) -> int:
    """Channels of the MLP."""
    if config.hidden is not None:
        return config.hidden
    # 8/3 of the width keeps the number of weights where there is a third matrix.
    return 8 * config.width // 3 if config.mlp == "swiglu" else 4 * config.width


def parameter_count(weights) -> int:
    """The number of weights in a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share `rate` to zero and scales the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x
    return counter_dropout.dropout(x, rate, key)


def _in_turn(step, carry, inputs, operands: list[BlockOperands] | None):
    """`lax.scan` of a step that is also given the operands of its block.

    On a GPU one step stands after another in the program: the loop would copy what each keeps for
    the backward pass, which took two fifths of a training step, and operands would be stacked. On a
    CPU nothing is gained, and compiling takes longer.
    """
    if operands is None and not targets.on_gpu():
        return jax.lax.scan(lambda carry, given: step(carry, given, None), carry, inputs)
    outputs = []
    for i in range(len(jax.tree.leaves(inputs)[0])):
        given = jax.tree.map(lambda x: x[i], inputs)  # noqa: B023
        carry, output = step(carry, given, None if operands is None else operands[i])
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs) if outputs else None


def _norm(width: int, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=EPSILON, use_bias=False, dtype=dtype, rngs=rngs)
