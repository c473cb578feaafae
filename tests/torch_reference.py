"""GPT and LoopLM in plain PyTorch, written from their equations alone: the truth for tests.

Weights are a dict of tensors named as in a run folder (`block.qkv.kernel`, kernels `[in, out]`,
those of a GPT's blocks stacked in front). Everything runs in the dtype of the weights; float64
leaves only the other side's rounding in a comparison.
"""

import math

import torch

Weights = dict[str, torch.Tensor]


def gpt_states(weights: Weights, tokens: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """The residual stream after each block of a GPT, `[batch, length, width]`."""
    state, states = weights["embedding.embedding"][tokens], []
    for layer in range(len(weights["blocks.qkv.kernel"])):
        own = {name: array[layer] for name, array in _within("blocks.", weights).items()}
        state = block(own, state, torch.arange(tokens.shape[1]), heads)
        states.append(state)
    return states


def loop_states(
    weights: Weights,
    tokens: torch.Tensor,
    heads: int,
    inject_input: bool,
    loops: int | None = None,
) -> list[torch.Tensor]:
    """The residual stream after each loop of a LoopLM, `[batch, length, width]`."""
    state, states = weights["embedding.embedding"][tokens], []
    for step in loop_steps(weights, tokens, heads, inject_input, loops):
        state = step(state)
        states.append(state)
    return states


def loop_steps(
    weights: Weights,
    tokens: torch.Tensor,
    heads: int,
    inject_input: bool,
    loops: int | None = None,
) -> list:
    """The loops of a LoopLM as functions of the state; those beyond training repeat the last."""
    first = weights["embedding.embedding"][tokens]
    trained = len(weights["step_embedding.embedding"])

    def step(state, number):
        state = state + weights["step_embedding.embedding"][min(number, trained - 1)]
        if inject_input:
            state = state + first
        return block(_within("block.", weights), state, torch.arange(tokens.shape[1]), heads)

    count = trained if loops is None else loops
    return [lambda state, number=number: step(state, number) for number in range(count)]


def halt(
    weights: Weights,
    tokens: torch.Tensor,
    thresholds: torch.Tensor,
    heads: int,
    inject_input: bool,
    loops: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A LoopLM that freezes each token once its largest probability reaches its threshold.

    Returns:
      Logits `[batch, length, vocabulary]`, loops taken `[batch, length]`, and how close any
      decision was: the least distance of a probability from its threshold.
    """
    state = weights["embedding.embedding"][tokens].clone()
    steps = torch.zeros(tokens.shape, dtype=torch.int64)
    running, closest = torch.ones(tokens.shape, dtype=torch.bool), math.inf
    for step in loop_steps(weights, tokens, heads, inject_input, loops):
        state[running] = step(state)[running]
        steps[running] += 1
        distance = readout(weights, state).softmax(-1).amax(-1) - thresholds
        closest = min([closest, *distance[running].abs().tolist()])
        running = running & (distance < 0)
    return readout(weights, state), steps, closest


def readout(weights: Weights, state: torch.Tensor) -> torch.Tensor:
    """Logits `[..., vocabulary]`: final norm, then the embedding as the head."""
    return layer_norm(state, weights["final_norm.scale"]) @ weights["embedding.embedding"].T


def loss(
    weights: Weights, supervised: list[torch.Tensor], targets: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the answer tokens, averaged over the supervised states.

    A GPT supervises its last state, a LoopLM those of the loops from `len(states) // 2` on.
    """
    entropies = []
    for state in supervised:
        log_probabilities = readout(weights, state).log_softmax(-1)
        chosen = log_probabilities.gather(-1, targets[..., None])[..., 0]
        entropies.append(-chosen[answer].mean())
    return torch.stack(entropies).mean()


def block(own: Weights, x: torch.Tensor, positions: torch.Tensor, heads: int) -> torch.Tensor:
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""
    x = x + attention(own, layer_norm(x, own["norm1.scale"]), positions, heads)
    return x + mlp(own, layer_norm(x, own["norm2.scale"]))


def attention(own: Weights, x: torch.Tensor, positions: torch.Tensor, heads: int) -> torch.Tensor:
    """Causal attention with rotated queries and keys, one head after another."""
    parts = (part.chunk(heads, dim=-1) for part in (x @ own["qkv.kernel"]).chunk(3, dim=-1))
    future = torch.ones(len(positions), len(positions)).triu(1).bool()
    mixed = []
    for q, k, v in zip(*parts, strict=True):
        scores = rotate(q, positions) @ rotate(k, positions).transpose(1, 2)
        scores = (scores / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        mixed.append(scores.softmax(-1) @ v)
    return torch.cat(mixed, dim=-1) @ own["attention_out.kernel"]


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE: channels i and i + half as complex numbers, turned by `position * 10000^(-i/half)`."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def mlp(own: Weights, x: torch.Tensor) -> torch.Tensor:
    """`W_2 gelu(W_1 x)` with the exact GELU, or SwiGLU where there is a third matrix."""
    hidden = x @ own["mlp_in.kernel"]
    if "mlp_value.kernel" in own:
        hidden = hidden * torch.sigmoid(hidden) * (x @ own["mlp_value.kernel"])
    else:
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ own["mlp_out.kernel"]


def layer_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the channels, times a scale; no bias."""
    centred = x - x.mean(-1, keepdim=True)
    return scale * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def _within(prefix: str, weights: Weights) -> Weights:
    """The weights below a prefix, named without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in weights.items()
        if name.startswith(prefix)
    }
