"""Weights of the original PyTorch system.

The original saves a dictionary with `torch.save`: its weights (`model`), the architecture
(`model_args`), the number of steps (`iter_num`) and, for a LoopLM, `num_loops`; some files also
hold the settings of their training (`config`). What it calls its weights, and what we do:

    transformer.wte.weight, lm_head.weight    embedding.embedding, one array for both
    step_embedding.weight                     step_embedding.embedding
    transformer.h.3.attn.c_attn.weight        blocks.qkv.kernel[3], transposed
    transformer.h.attn.c_attn.weight          block.qkv.kernel, transposed
    transformer.ln_f.weight                   final_norm.scale

Nothing is written before all of it has been checked, and no code in the file is ever run.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from spak_jax import models
from spak_jax.command_line import InputError
from spak_jax.config import Config, parse_config
from spak_jax.config_sections import Architecture, StaticModel
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training.named_arrays import from_named, named_arrays

VOCABULARY_SIZE = len(Addition().vocabulary)

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
BLOCK_NUMBER = re.compile(r"transformer\.h\.([0-9]+)\.")
STEP_EMBEDDING = "step_embedding.weight"

OUTSIDE_BLOCKS = {
    "embedding.embedding": EMBEDDING,
    "step_embedding.embedding": STEP_EMBEDDING,
    "final_norm.scale": "transformer.ln_f.weight",
}
IN_BLOCK = {
    "norm1.scale": "ln_1.weight",
    "qkv.kernel": "attn.c_attn.weight",
    "attention_out.kernel": "attn.c_proj.weight",
    "norm2.scale": "ln_2.weight",
}
MLP = {
    "gelu": {"mlp_in.kernel": "mlp.c_fc.weight", "mlp_out.kernel": "mlp.c_proj.weight"},
    "swiglu": {
        "mlp_in.kernel": "mlp.w1.weight",
        "mlp_value.kernel": "mlp.w2.weight",
        "mlp_out.kernel": "mlp.w3.weight",
    },
}


class Original(NamedTuple):
    """A checkpoint of the original, checked as far as it can be without knowing the model.

    weights: float32 arrays by the original's names, without the tied head. arguments: its
    `model_args`. training: its `config`, empty where the file has none. loops: its `num_loops`,
    None where the file has none. step: of its training.
    """

    path: Path
    weights: dict[str, np.ndarray]
    arguments: Mapping[str, Any]
    training: Mapping[str, Any]
    loops: int | None
    step: int


def read_original(path: Path) -> Original:
    """A checkpoint file of the original.

    Raises:
      InputError: it cannot be read, holds code, or is no such checkpoint; or its weights are not
        finite floating-point arrays, have biases, or a head of their own.
    """
    contents = _load(path)
    if not isinstance(contents, Mapping):
        raise InputError(f"{path}: expected a dictionary with model and model_args")
    weights = _weights(path, _dictionary(path, contents, "model"))
    arguments = _dictionary(path, contents, "model_args")
    training = _dictionary(path, contents, "config") if "config" in contents else {}
    step = contents.get("iter_num", 0)
    if not isinstance(step, int) or step < 0:
        raise InputError(f"{path}: iter_num = {step!r}: must be a number of steps")
    loops = contents.get("num_loops", training.get("num_loops"))
    return Original(path, weights, arguments, training, loops, step)


def describe(original: Original, name: str, inject_input: bool) -> Config:
    """The configuration of an imported run: the original's model, data and recipe.

    Args:
      original: the checkpoint.
      name: of the configuration.
      inject_input: whether a LoopLM was trained so, where the checkpoint does not say.

    Raises:
      InputError: the checkpoint describes no model that exists here.
    """
    path, arguments = original.path, original.arguments
    if arguments.get("bias"):
        raise InputError(f"{path}: model_args.bias is set, but no model here has biases")
    vocabulary = arguments.get("vocab_size", VOCABULARY_SIZE)
    if vocabulary != VOCABULARY_SIZE:
        raise InputError(
            f"{path}: model_args.vocab_size = {vocabulary!r}: the vocabulary of additions has"
            f" {VOCABULARY_SIZE} symbols"
        )
    gated = any(name.endswith(".mlp.w1.weight") for name in original.weights)
    architecture = {
        "width": _argument(original, "n_embd"),
        "heads": _argument(original, "n_head"),
        "mlp": "swiglu" if arguments.get("use_swiglu", gated) else "gelu",
    }
    if "dropout" in arguments:
        architecture["dropout"] = arguments["dropout"]
    blocks = {match[1] for name in original.weights if (match := BLOCK_NUMBER.match(name))}
    if blocks and STEP_EMBEDDING not in original.weights:
        system, kind = _static(original, len(blocks), inject_input)
    else:
        system, kind = _looped(original, inject_input)
    values = {"name": name, "system": f"imported {system}", "model": architecture | kind}
    return parse_config(values, f"the configuration for {path}")


def translate(original: Original, config: Config) -> nnx.State:
    """The weights of a checkpoint as those of the model that `config` describes, float32.

    Raises:
      InputError: naming weights that are missing, unknown or of another shape.
    """
    _, state = models.abstract(config)
    like = nnx.to_pure_dict(state)
    wanted = named_arrays(like)
    sources = {name: _sources(name, config.model) for name in wanted}
    _check_names(original, {source for group in sources.values() for source in group})
    arrays = {}
    for name, group in sources.items():
        stacked = name.startswith("blocks.")
        shape = wanted[name].shape[1:] if stacked else wanted[name].shape
        parts = [_translated(original, source, name, shape) for source in group]
        arrays[name] = np.stack(parts) if stacked else parts[0]
    nnx.replace_by_pure_dict(state, from_named(like, arrays))
    return state


def _load(path: Path) -> Any:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    try:
        import torch
    except ImportError:
        raise InputError(
            "PyTorch reads the original's checkpoints and is not installed: pip install torch"
        ) from None
    try:
        # Its warnings about odd pickles add nothing to the message below.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch fails in many ways on what it cannot read
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path} asks for {called[1]} to be loaded; only tensors, numbers, texts, lists"
                " and dictionaries are accepted, since anything else could run code"
            ) from None
        raise InputError(
            f"{path} is damaged or no PyTorch checkpoint ({type(error).__name__})"
        ) from None


def _dictionary(path: Path, contents: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key not in contents:
        raise InputError(f"{path}: {key} is missing; a checkpoint has model and model_args")
    if not isinstance(contents[key], Mapping):
        raise InputError(f"{path}: {key} is no dictionary")
    return contents[key]


def _weights(path: Path, tensors: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    # torch.compile prefixes every name; the tables of rotation angles are no weights.
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise InputError(f"{path}: no model here has biases, but it holds {_listed(biases)}")
    weights = {name: _array(path, name, tensor) for name, tensor in tensors.items()}
    head = weights.pop(HEAD, None)
    embedding = weights.get(EMBEDDING)
    if head is not None and embedding is not None and not np.array_equal(head, embedding):
        raise InputError(f"{path}: {HEAD} differs from {EMBEDDING}; here they are one array")
    return weights


def _array(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    if not (dense and tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.ndim):
        raise InputError(f"{path}: {name} is no plain array of floating-point numbers")
    array = tensor.detach().to(torch.float32).numpy()
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds numbers that are not finite")
    return array


def _argument(original: Original, key: str) -> Any:
    if key not in original.arguments:
        raise InputError(f"{original.path}: model_args.{key} is missing")
    return original.arguments[key]


def _static(original: Original, blocks: int, inject_input: bool) -> tuple[str, dict[str, Any]]:
    if inject_input:
        raise InputError(f"--inject-input: {original.path} holds a GPT, which has no loops")
    layers = _argument(original, "n_layer")
    if layers != blocks:
        raise InputError(
            f"{original.path}: model_args.n_layer = {layers!r}, but the weights are of {blocks}"
            " blocks"
        )
    return f"GPT-{layers}L", {"kind": "gpt", "layers": layers}


def _looped(original: Original, inject_input: bool) -> tuple[str, dict[str, Any]]:
    if STEP_EMBEDDING not in original.weights:
        raise InputError(f"{original.path}: the weights {STEP_EMBEDDING} are missing")
    trained_loops = len(original.weights[STEP_EMBEDDING])
    loops = trained_loops if original.loops is None else original.loops
    injected = original.training.get("inject_x0", inject_input)
    if inject_input and not injected:
        raise InputError(f"--inject-input: {original.path} says that its inject_x0 is {injected}")
    return f"LoopLM-{loops}", {"kind": "loop", "loops": loops, "inject_input": injected}


def _sources(name: str, architecture: Architecture) -> list[str]:
    """The original's names of one of our weights: one for each block where ours are stacked."""
    if name in OUTSIDE_BLOCKS:
        return [OUTSIDE_BLOCKS[name]]
    _, _, weight = name.partition(".")
    weight = (IN_BLOCK | MLP[architecture.mlp])[weight]
    if isinstance(architecture, StaticModel):
        return [f"transformer.h.{block}.{weight}" for block in range(architecture.layers)]
    return [f"transformer.h.{weight}"]


def _check_names(original: Original, wanted: set[str]) -> None:
    missing, unknown = wanted - original.weights.keys(), original.weights.keys() - wanted
    found = [
        f"the weights {_listed(sorted(names))} are {verdict}"
        for names, verdict in ((missing, "missing"), (unknown, "unknown"))
        if names
    ]
    if found:
        raise InputError(f"{original.path}: {'; '.join(found)}")


def _translated(original: Original, source: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # torch.nn.Linear stores [outputs, inputs].
    transposed = name.endswith(".kernel")
    array, expected = original.weights[source], shape[::-1] if transposed else shape
    if array.shape != expected:
        raise InputError(
            f"{original.path}: {source} has the shape {list(array.shape)}, expected"
            f" {list(expected)}"
        )
    return array.T if transposed else array


def _listed(names: Sequence[str]) -> str:
    first, others = names[:4], names[4:]
    return ", ".join(first) + (f" (and {len(others)} more)" if others else "")
