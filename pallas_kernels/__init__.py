"""Kernels for the transformers of `spak_jax`, each beside the plain `jnp` truth it must equal.

What stands here is imported when it is asked for: programs that only draw need not wait for JAX.
"""

import importlib

# By name, where each stands.
_PUBLIC = {
    "IMPLEMENTATIONS": "dispatch",
    "Choice": "dispatch",
    "add_and_norm": "residual",
    "add_and_score": "readout",
    "attention": "dispatch",
    "choose": "dispatch",
    "gelu": "activation",
    "looped_block": "looped",
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
