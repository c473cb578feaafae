"""Pytrees as arrays by name, the names under which checkpoints store them, and their digest."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Weights that have kept the name by which files of all times store them.
STORED_NAMES = {
    "position_scheme.counter.gate_logits": "pointer.gate_logits",
    "position_scheme.id_embedding.embedding": "id_embedding.embedding",
}


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted paths, as they are stored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_stored_name(path): leaf for path, leaf in leaves}


def _stored_name(path: tuple) -> str:
    # Some versions of Flax show a variable's value as a level of its own.
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    for ours, stored in STORED_NAMES.items():
        # An optimizer's arrays have the names of weights behind their own.
        if name == ours or name.endswith(f".{ours}"):
            return name.removesuffix(ours) + stored
    return name


def from_named(like: Any, arrays: Mapping[str, Any]) -> Any:
    """The pytree shaped as `like` whose leaves stand in `arrays` under their dotted paths.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype.
    """
    wanted = named_arrays(like)
    if wanted.keys() != arrays.keys():
        odd = sorted(wanted.keys() ^ arrays.keys())
        raise ValueError(f"the arrays {', '.join(odd[:4])} are missing or unknown")
    for name, leaf in wanted.items():
        found = arrays[name]
        if (leaf.shape, leaf.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"{name} is {found.dtype}{list(found.shape)}, expected"
                f" {leaf.dtype}{list(leaf.shape)}"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # As bytes, without a copy; some dtypes have no buffer of their own.
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()
