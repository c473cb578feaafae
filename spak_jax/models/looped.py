"""`LoopLM`: one transformer block, applied again and again."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops import looped, reference
from spak_jax.models import fused
from spak_jax.models.block import EPSILON
from spak_jax.models.fused import Stream
from spak_jax.models.halting import for_steps, init_halting, until_halted, update_halting
from spak_jax.models.transformer import Architecture, Transformer, make_block


class LoopedArchitecture(Architecture, Protocol):
    """What a configuration (`spak_jax.config_sections.LoopedModel`) says."""

    loops: int
    inject_input: bool
    normalize_state: bool
    answer_feedback: bool
    shared_step: bool
    no_grad_warmup_loops: int
    supervised_loops: int | None


class LoopLM(Transformer):
    """One block applied `config.loops` times, or as often as a call asks for.

    A learned step embedding is added before each loop, and the training loss reads out every loop
    of the second half, or of the last `config.supervised_loops`, not the last alone. Halting runs
    the loops of the model that was trained, position information included, and only freezes what
    has been decided.
    """

    def __init__(
        self,
        config: LoopedArchitecture,
        vocabulary: int,
        dtype,
        attention: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocabulary, dtype, rngs)
        self.loops = config.loops
        self.block = make_block(config, 1, dtype, attention, rngs)
        if config.answer_feedback:
            # Not those of the input: a symbol that was given is no answer.
            self.answer_embedding = nnx.Embed(
                vocabulary,
                config.width,
                embedding_init=nnx.initializers.normal(config.init_std),
                rngs=rngs,
            )
        self.steps = 1 if config.shared_step else config.loops
        self.step_embedding = nnx.Embed(
            self.steps,
            config.width,
            embedding_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        loops: int | jax.Array | None = None,
        positions: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits after the last loop.

        Args:
          tokens: int `[batch, length]`.
          loops: None for as many as in training; beyond those the last step embedding repeats. An
            int32 array `[batch]` gives each sequence its own number, in one program for all
            numbers; it has no gradient and no dropout.
          positions: int `[length]` or `[batch, length]`; None counts from 0.
          position_ids: int32 `[batch, length]`, the task's, for the schemes that go by them.
          key: PRNG key for dropout; None is deterministic.

        Returns:
          float32 `[batch, length, vocabulary]`.
        """
        more = {"positions": positions, "position_ids": position_ids}
        if isinstance(loops, jax.Array):
            given = tokens, loops[:, None], positions, position_ids
            return self.unembed(self._halting(until_halted, None, "confidence", *given).x)
        if key is None and fused.supports_fused(self, tokens):
            return self.fused_forward(tokens, loops=loops, **more)[0]
        step, stream, inputs = self._loop(tokens, loops, positions, position_ids, key)
        stream, last = jax.lax.scan(step, stream, inputs)
        last = None if last is None else last[-1]
        return self.unembed(fused.apply_pending(stream, last, self.dropout))

    def supervised_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        position_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """What the training loss averages over: a sum for every loop that is supervised, the last
        `config.supervised_loops`, or the second half.

        With `config.no_grad_warmup_loops` and a key, the state has gone through a random number of
        loops before, which the gradient does not go back through (as Bansal et al. 2022 train
        networks to think longer, End-to-end Algorithm Synthesis with Recurrent Networks): so the
        loops that count are not always the first ones.

        Args:
          tokens: int `[batch, length]`.
          targets: int `[batch, length]`, the right next tokens.
          weights: float32 `[batch, length]`, of their cross-entropies.
          position_ids: as in a plain call.
          key: PRNG key for dropout; None is deterministic.
          progress: share of the training that is done, which annealed position schemes go by; None
            outside it.

        Returns:
          float32 `[supervised]`: weighted sums of the cross-entropies.
        """
        given = tokens, targets, weights, position_ids, key, progress
        return fused.with_batched_weight_grads(LoopLM._losses, self, "block", self.loops, given)

    def _losses(self, tokens, targets, weights, position_ids, key, progress, deferred=None):
        """`supervised_losses`; deferred: of each loop, as of `fused.apply_block`."""
        step, stream, inputs = self._loop(tokens, None, None, position_ids, key, progress)
        if self.config.no_grad_warmup_loops and key is not None:
            stream = self._after_warmup_loops(stream, tokens, position_ids, key, progress)
        unread = self.loops // 2
        if self.config.supervised_loops:
            unread = self.loops - self.config.supervised_loops

        def scored(x, given, deferred):
            stream, last = step(Stream(x), given, deferred)
            return fused.add_loss(self, stream, last, targets, weights)

        first = jax.tree.map(lambda x: x[:unread], inputs)
        second = jax.tree.map(lambda x: x[unread:], inputs)
        early, late = (None, None) if deferred is None else (deferred[:unread], deferred[unread:])
        stream, last = fused.scan_or_unroll(step, stream, first, early)
        # Before the first loop nothing is pending, and there is no key to drop it by.
        last = last[-1] if unread and key is not None else None
        x = fused.apply_pending(stream, last, self.dropout)
        return fused.scan_or_unroll(scored, x, second, late)[1]

    def _after_warmup_loops(self, stream, tokens, position_ids, key, progress):
        """The stream after a random number of loops, without a gradient unless there is none."""
        definition, weights = nnx.split(self)
        # A loop whose length is not known cannot be gone back through: nothing may ask for it.
        fixed = nnx.merge(definition, jax.lax.stop_gradient(weights))
        step, first, inputs = fixed._loop(tokens, 1, None, position_ids, key, progress)
        shift, keys = jax.tree.map(lambda x: x[0], inputs)

        def one(i, stream):
            fresh = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            return step(stream, (shift, fresh))[0]

        most = self.config.no_grad_warmup_loops
        count = jax.random.randint(jax.random.fold_in(key, 1), (), 0, most + 1)
        moved = jax.lax.fori_loop(0, count, one, first)
        return jax.tree.map(lambda x, y: jnp.where(count > 0, x, y), moved, stream)

    def halting_logits(
        self,
        tokens: jax.Array,
        thresholds: jax.Array,
        *,
        rule: str = "confidence",
        loops: int | jax.Array | None = None,
        positions: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits where each token stops once it has thought enough ("wait to think").

        A token that halts after a loop keeps that loop's state from then on; the tokens that go on
        still attend to it. By the rule "confidence" it halts when its largest probability reaches
        its threshold; by the rule "convergence", when its state has moved in the loop, as a share
        of the length that it has now, by no more than its threshold, as have those of all tokens
        before it; by the rule "agreement", when its probabilities have, by their total variation,
        and theirs: a state may go on in circles that no answer shows. Without those before it, a
        token would halt before what it looks at has come to rest. Where tokens see both sides
        (`config.causal = False`), a sequence halts as a whole, when all of its tokens have come to
        rest in the same loop.

        Loops end with the last token of the batch that halts. Gradients go back through all that
        are allowed.

        Args:
          tokens: int `[batch, length]`.
          thresholds: float, broadcastable to `[batch, length]`; a probability above 1, or a share
            or variation below 0, never halts.
          rule: of `spak_jax.models.halting.RULES`.
          loops: the most loops to run; None for as many as in training; an int32 array `[batch]`
            gives each sequence its own number, and has no gradient.
          positions, position_ids: as in a plain call.

        Returns:
          float32 logits `[batch, length, vocabulary]` and the int32 number of loops that each
          token took, `[batch, length]`.
        """
        each = isinstance(loops, jax.Array)
        if not each and rule in looped.RULES and fused.supports_fused(self, tokens):
            more = {"positions": positions, "position_ids": position_ids}
            return self.fused_forward(tokens, thresholds, rule=rule, loops=loops, **more)
        loops = self.loops if loops is None else loops
        definition, weights = nnx.split(self)

        def repeated(repeat):
            def run(given, others, _):
                weights, thresholds = given
                network = nnx.merge(definition, weights)
                state = network._halting(repeat, thresholds, rule, *others)
                return network.unembed(state.x), state.steps

            return run

        run = repeated(until_halted)
        # Nothing goes back through a loop whose length is not known.
        halting = differentiable(run, run if each else repeated(for_steps(loops)))
        given = weights, jnp.asarray(thresholds)
        most = loops[:, None] if each else jnp.int32(loops)
        return halting(given, (tokens, most, positions, position_ids), None)

    def _halting(self, repeat, thresholds, rule, tokens, most, positions, position_ids):
        """The `HaltingState` after the last loop.

        repeat: `until_halted` or `for_steps`. most: loops, broadcastable to `[batch, length]`. The
        rest as of `halting_logits`; thresholds may be None.
        """
        embedded = self._embed(tokens, positions, position_ids, None, 0)
        enter, _ = self._inference(embedded.x, 1)

        def step(state):
            # Tokens that have not halted have taken every loop so far.
            shift = self._steps_of(state.steps.max(initial=0)[None])[0]
            block, x, shift = enter(state.x, shift)
            x = fused.run_block(block, x, embedded.position_inputs, shift)
            return update_halting(
                state, x, thresholds, self.unembed, rule, causal=self.config.causal, most=most
            )

        first = init_halting(embedded.x)
        return repeat(step, first._replace(halted=first.halted | (most <= 0)))

    def fused_forward(
        self,
        tokens: jax.Array,
        thresholds: jax.Array | None = None,
        *,
        rule: str = "confidence",
        loops: int | None = None,
        positions: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `halting_logits`, and without thresholds as a plain call, in one launch.

        Raises:
          ValueError: the block is none that one launch is known to equal, or
            `pallas_kernels.looped_block` does not hold such rows.
        """
        embedded = self._embed(tokens, positions, position_ids, None, 0)
        return fused.fused_forward(
            self,
            embedded.x,
            embedded.position_inputs,
            loops=self.loops if loops is None else loops,
            thresholds=thresholds,
            rule=rule,
        )

    def supports_fused(self, tokens: jax.Array) -> bool:
        """Whether inference takes one launch for such rows (`fused.supports_fused`)."""
        return fused.supports_fused(self, tokens)

    def forward_with_intermediates(
        self,
        tokens: jax.Array,
        *,
        loops: int | None = None,
        position_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The logits of every loop and where it looks, to see how an answer comes about.

        Args:
          tokens, loops, position_ids: as in a plain call.

        Returns:
          float32 logits `[loops, batch, length, vocabulary]` and weights of attention
          `[loops, batch, heads, length, length]`, keys last; None for those where the block's class
          does not give any (`Block.attention_weights`).
        """
        embedded = self._embed(tokens, None, position_ids, None, 0)
        enter, given = self._inference(embedded.x, loops)

        def step(x, given):
            block, x, shift = enter(x, given)
            weights = fused.attention_weights(block, x, embedded.position_inputs, shift)
            x = fused.run_block(block, x, embedded.position_inputs, shift)
            return x, (self.unembed(x), weights)

        return jax.lax.scan(step, embedded.x, given)[1]

    def _loop(self, tokens, loops, positions, position_ids, key, progress=None):
        """One loop as a scan's step over the stream, the first stream, and what each loop is given.

        With the stream, the step gives the key of the dropout of what is pending.
        """
        loops = self.loops if loops is None else loops
        embedded = self._embed(tokens, positions, position_ids, key, loops, progress)
        definition, weights = nnx.split(self.block)

        def step(stream, given, deferred=None):
            shift, keys = given
            block = nnx.merge(definition, weights)
            stream = self._enter(stream, embedded.x, keys)
            stream = fused.apply_block(
                block, stream, embedded.position_inputs, keys, shift, deferred
            )
            return stream, None if keys is None else keys[-1]

        stream = fused.first_stream(self.block, embedded.x, self.dtype)
        return step, stream, (self._step_embeddings(loops), embedded.keys)

    def _inference(self, first, loops):
        """How a stream goes through the model block by block.

        Args:
          first: the embedded input.
          loops: None for as many as in training.

        Returns:
          A function of the stream and what a block is given, and what all are given: it gives the
          block, the stream as that takes it, and the shift.
        """
        definition, weights = nnx.split(self.block)

        def enter(x, shift):
            return nnx.merge(definition, weights), self._enter(Stream(x), first, None).x, shift

        return enter, self._step_embeddings(loops)

    def _step_embeddings(self, loops):
        """The step embedding of each loop, float32 `[loops, width]`."""
        return self._steps_of(jnp.arange(self.loops if loops is None else loops))

    def _steps_of(self, loops):
        """The step embedding of some loops, counted from 0: `[loops]` to `[loops, width]`."""
        return self.step_embedding(jnp.minimum(loops, self.steps - 1))

    def _embed_answer(self, logits):
        """What stands for an answer, float32 `[..., width]`: the mean of its symbols' vectors."""
        return jnp.einsum(
            "...v,vd->...d",
            jax.nn.softmax(logits).astype(self.dtype),
            self.answer_embedding.embedding[...].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )

    def _enter(self, stream, first, keys):
        """The stream as a loop's block takes it.

        first: the embedded input. keys: of the loop's block.
        """
        if self.config.normalize_state or self.config.answer_feedback:
            x = fused.apply_pending(stream, None if keys is None else keys[0], self.dropout)
            if self.config.answer_feedback:
                x = self._embed_answer(self.unembed(x))
            if self.config.normalize_state:
                x = reference.layer_norm(x, 1.0, EPSILON)
            stream = Stream(x)
        x, pending = stream
        return Stream(x + first, pending) if self.config.inject_input else stream
