"""Kernels for the transformers of `spak_jax`, each beside the plain `jnp` truth it must equal.

What stands here is imported when it is asked for: programs that only draw need not wait for JAX.
"""

import importlib

# By name, where each stands.
_PUBLIC = {
    "IMPLEMENTATIONS": "ops.attention",
    "Choice": "ops.attention",
    "add_layer_norm": "ops.add_layer_norm",
    "add_layer_norm_cross_entropy": "ops.cross_entropy",
    "attention": "ops.attention",
    "choose": "ops.attention",
    "gelu": "ops.gelu",
    "looped_block": "ops.looped",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
