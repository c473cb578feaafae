"""Attention with RoPE, dropout, learned biases and windows inside."""

from pallas_kernels.ops.attention.api import IMPLEMENTATIONS, Choice, attention, choose

__all__ = ["IMPLEMENTATIONS", "Choice", "attention", "choose"]
