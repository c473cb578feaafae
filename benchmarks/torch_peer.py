"""The peer that `models` times beside ours: the same ones in PyTorch, as its users would run them.

`torch.compile` with CUDA graphs, scaled_dot_product_attention, bfloat16 autocast, fused AdamW,
batches ready on the GPU.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from spak_jax.config import Config
from spak_jax.config_sections import StaticModel

ROPE_BASE = 10_000.0


class Block(nn.Module):
    """Pre-norm block of width channels, exact GELU or SwiGLU."""

    def __init__(self, width: int, heads: int, gated: bool, dropout: float):
        super().__init__()
        self.heads, self.gated, self.dropout = heads, gated, dropout
        hidden = 8 * width // 3 if gated else 4 * width
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)  # noqa: E731
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = linear(width, 3 * width)
        self.attention_out = linear(width, width)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp_in = linear(width, hidden)
        if gated:
            self.mlp_value = linear(width, hidden)
        self.mlp_out = linear(hidden, width)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        rate = self.dropout if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            _turn(q, cos, sin), _turn(k, cos, sin), v, dropout_p=rate, is_causal=True
        )
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + functional.dropout(mixed, rate)
        normed = self.norm2(x)
        hidden = self.mlp_in(normed)
        if self.gated:
            hidden = functional.silu(hidden) * self.mlp_value(normed)
        else:
            hidden = functional.gelu(hidden)
        return x + functional.dropout(self.mlp_out(hidden), rate)


class Peer(nn.Module):
    """GPT or LoopLM, by the configuration."""

    def __init__(self, config: Config, vocabulary: int):
        super().__init__()
        architecture = config.model
        self.static = isinstance(architecture, StaticModel)
        self.dropout = architecture.dropout
        self.depth = architecture.layers if self.static else architecture.loops
        self.inject_input = not self.static and architecture.inject_input
        self.embedding = nn.Embedding(vocabulary, architecture.width)
        self.blocks = nn.ModuleList(
            Block(
                architecture.width,
                architecture.heads,
                architecture.mlp == "swiglu",
                architecture.dropout,
            )
            for _ in range(self.depth if self.static else 1)
        )
        self.step_embedding = None if self.static else nn.Embedding(self.depth, architecture.width)
        self.final_norm = nn.LayerNorm(architecture.width, bias=False)
        half = architecture.width // architecture.heads // 2
        frequency = ROPE_BASE ** (-torch.arange(half) / half)
        angle = torch.arange(config.data.row_length)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def states(self, tokens):
        """The streams that are read out: of a GPT the last, of a LoopLM the second half's."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = first = functional.dropout(self.embedding(tokens), self.dropout, self.training)
        states = []
        for step in range(self.depth):
            if not self.static:
                x = x + self.step_embedding.weight[step]
                if self.inject_input:
                    x = x + first
            x = self.blocks[step if self.static else 0](x, cos, sin)
            states.append(x)
        return states[-1:] if self.static else states[self.depth // 2 :]

    def readout(self, state):
        """Logits `[..., vocabulary]`."""
        return functional.linear(self.final_norm(state), self.embedding.weight)

    def loss(self, tokens, targets, weights):
        """Weighted sums of the cross-entropies, averaged over the readouts."""
        logits = self.readout(torch.stack(self.states(tokens))).float()
        wanted = targets.expand(logits.shape[:-1])
        entropies = functional.cross_entropy(
            logits.flatten(0, -2), wanted.flatten(), reduction="none"
        )
        return (entropies.view(wanted.shape) * weights).sum() / len(logits)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes the weights of a run folder, by their names there."""
        for name, array in weights.items():
            for i, part in enumerate(array if name.startswith("blocks.") else [array]):
                target = name.replace("blocks.", f"blocks.{i}.").replace("block.", "blocks.0.")
                target = target.rsplit(".", 1)[0] + ".weight"
                part = part.T if name.endswith("kernel") else part
                self.get_parameter(target).data.copy_(torch.from_numpy(np.array(part)))


def training_steps(config: Config, vocabulary: int, batches: Sequence) -> Callable[[int], None]:
    """A function that takes some number of training steps, and returns when they are done.

    batches: tokens, targets and weights as NumPy arrays, taken in turn.
    """
    recipe = config.train
    peer = Peer(config, vocabulary).cuda()
    optimizer = torch.optim.AdamW(
        peer.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    loss = torch.compile(peer.loss, mode="reduce-overhead")
    ready = [[torch.from_numpy(np.array(x)).cuda() for x in batch] for batch in batches]
    ready = [(tokens.long(), targets.long(), weights) for tokens, targets, weights in ready]

    def run(count: int) -> None:
        for i in range(count):
            with torch.autocast("cuda", torch.bfloat16):
                value = loss(*ready[i % len(ready)])
            value.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()

    return run


def scoring_passes(config: Config, vocabulary: int, tokens: np.ndarray) -> Callable[[int], None]:
    """A function that reads some number of batches, `[rows, length]`, for the likeliest tokens."""
    peer = Peer(config, vocabulary).cuda().eval()
    choose = torch.compile(
        lambda tokens: peer.readout(peer.states(tokens)[-1]).argmax(-1), mode="reduce-overhead"
    )
    ready = torch.from_numpy(np.array(tokens)).cuda().long()

    def run(count: int) -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(count):
                choose(ready)
        torch.cuda.synchronize()

    return run


def _turn(x, cos, sin):
    low, high = x.float().chunk(2, dim=-1)
    turned = torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)
    return turned.to(x.dtype)
