"""Importing the original's checkpoints: the same logits, and a clear refusal of all else."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_reference  # noqa: E402

from spak_jax import convert, evaluate  # noqa: E402
from spak_jax.command_line import run_program  # noqa: E402
from spak_jax.config_sections import Data, Train  # noqa: E402
from spak_jax.evaluation.forward import forward  # noqa: E402
from spak_jax.evaluation.loaded import load  # noqa: E402
from spak_jax.training import run_folder  # noqa: E402

WIDTH, HEADS, LAYERS, LOOPS, VOCABULARY = 32, 2, 3, 4, 13


def original(kind: str, *, swiglu: bool = False, seed: int = 0) -> dict:
    """What the original would save: random weights in its names and shapes, and its arguments."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator)  # noqa: E731
    scale = lambda: 1 + draw(WIDTH)  # noqa: E731

    weights = {"transformer.wte.weight": 3 * draw(VOCABULARY, WIDTH)}
    blocks = [f"transformer.h.{n}" for n in range(LAYERS)] if kind == "gpt" else ["transformer.h"]
    for block in blocks:
        weights[f"{block}.ln_1.weight"] = scale()
        weights[f"{block}.attn.c_attn.weight"] = draw(3 * WIDTH, WIDTH)
        weights[f"{block}.attn.c_proj.weight"] = draw(WIDTH, WIDTH)
        weights[f"{block}.ln_2.weight"] = scale()
        if swiglu:
            hidden = 8 * WIDTH // 3
            weights[f"{block}.mlp.w1.weight"] = draw(hidden, WIDTH)
            weights[f"{block}.mlp.w2.weight"] = draw(hidden, WIDTH)
            weights[f"{block}.mlp.w3.weight"] = draw(WIDTH, hidden)
        else:
            weights[f"{block}.mlp.c_fc.weight"] = draw(4 * WIDTH, WIDTH)
            weights[f"{block}.mlp.c_proj.weight"] = draw(WIDTH, 4 * WIDTH)
    weights["transformer.ln_f.weight"] = scale()
    if kind == "loop":
        weights["step_embedding.weight"] = draw(LOOPS, WIDTH)
    arguments = {
        "n_layer": LAYERS if kind == "gpt" else 1,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "block_size": 64,
        "bias": False,
        "vocab_size": VOCABULARY,
        "dropout": 0.1,
    }
    if swiglu:
        arguments["use_swiglu"] = True
    contents = {"model": weights, "model_args": arguments, "iter_num": 15_000}
    return contents | ({"num_loops": LOOPS} if kind == "loop" else {})


def reference_logits(contents: dict, tokens: np.ndarray, inject_input: bool = False):
    """Float64 logits of the equations with the weights of an original."""
    theirs = {name: weight.double() for name, weight in contents["model"].items()}
    names = {
        "norm1.scale": "ln_1",
        "qkv.kernel": "attn.c_attn",
        "attention_out.kernel": "attn.c_proj",
        "norm2.scale": "ln_2",
    }
    if any("mlp.w3" in name for name in theirs):
        names |= {"mlp_in.kernel": "mlp.w1", "mlp_value.kernel": "mlp.w2"}
        names |= {"mlp_out.kernel": "mlp.w3"}
    else:
        names |= {"mlp_in.kernel": "mlp.c_fc", "mlp_out.kernel": "mlp.c_proj"}

    turned = lambda weight: weight.T if weight.ndim == 2 else weight  # noqa: E731
    looped = "step_embedding.weight" in theirs
    weights = {
        "embedding.embedding": theirs["transformer.wte.weight"],
        "final_norm.scale": theirs["transformer.ln_f.weight"],
    }
    for ours, name in names.items():
        if looped:
            weights[f"block.{ours}"] = turned(theirs[f"transformer.h.{name}.weight"])
        else:
            parts = [turned(theirs[f"transformer.h.{n}.{name}.weight"]) for n in range(LAYERS)]
            weights[f"blocks.{ours}"] = torch.stack(parts)
    tokens = torch.tensor(tokens)
    if looped:
        weights["step_embedding.embedding"] = theirs["step_embedding.weight"]
        states = torch_reference.loop_states(weights, tokens, HEADS, inject_input)
    else:
        states = torch_reference.gpt_states(weights, tokens, HEADS)
    return torch_reference.readout(weights, states[-1]).numpy()


@pytest.fixture
def convert_file(tmp_path, monkeypatch):
    """Runs the program on contents (saved first) or a file: returns the run folder."""

    def run(contents, *options: str) -> Path:
        path = contents
        if isinstance(contents, dict):
            path = tmp_path / "ckpt.pt"
            torch.save(contents, path)
        folder = tmp_path / "runs" / "imported"
        monkeypatch.setattr(sys, "argv", ["convert", str(path), str(folder), *options])
        run_program(convert.main)
        return folder

    return run


@pytest.fixture
def refused(convert_file, tmp_path, capsys):
    """Runs the program on what it must refuse: returns its message."""

    def run(contents, *options: str) -> str:
        before = contents_of(tmp_path / "runs")
        with pytest.raises(SystemExit) as exit:
            convert_file(contents, *options)
        assert exit.value.code == 2
        assert contents_of(tmp_path / "runs") == before
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        return output.err

    return run


def contents_of(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_same_model(folder: Path, contents: dict, inject_input: bool = False) -> None:
    """The run folder's model gives the logits of the equations with the original's weights."""
    trained = load(folder)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 14))
    logits, _ = jax.jit(forward(trained.config))(trained.weights, jnp.asarray(tokens))
    expected = reference_logits(contents, tokens, inject_input)
    difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert difference < 1e-5


# What is imported.


@pytest.mark.parametrize("swiglu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("kind", ["gpt", "loop"])
def test_an_imported_model_is_the_same(kind, swiglu, convert_file):
    contents = original(kind, swiglu=swiglu)
    folder = convert_file(contents)
    check_same_model(folder, contents)
    config = load(folder).config
    assert run_folder.steps_in(folder) == [15_000]
    assert (config.model.width, config.model.heads) == (WIDTH, HEADS)
    assert config.model.dropout == 0.1
    assert config.model.mlp == ("swiglu" if swiglu else "gelu")
    assert (config.data, config.train) == (Data(), Train())
    assert config.name == "imported"
    assert config.system == ("imported GPT-3L" if kind == "gpt" else "imported LoopLM-4")


def test_a_compiled_models_names_and_what_is_no_weight(convert_file):
    contents = original("loop")
    stored = contents["model"] | {
        "lm_head.weight": contents["model"]["transformer.wte.weight"],
        "transformer.h.attn.rotary.inv_freq": torch.arange(8.0),
    }
    stored = {f"_orig_mod.{name}": weight for name, weight in stored.items()}
    check_same_model(convert_file(contents | {"model": stored}), contents)


@pytest.mark.parametrize("said_by", ["the flag", "the checkpoint", "both"])
def test_input_injection(said_by, convert_file):
    contents = original("loop")
    if said_by != "the flag":
        contents["config"] = {"inject_x0": True}
    folder = convert_file(contents, *([] if said_by == "the checkpoint" else ["--inject-input"]))
    assert load(folder).config.model.inject_input
    check_same_model(folder, contents, inject_input=True)


@pytest.mark.parametrize("where", ["config", "step embedding"])
def test_the_number_of_loops_may_stand_elsewhere(where, convert_file):
    contents = original("loop")
    del contents["num_loops"]
    if where == "config":
        contents["config"] = {"num_loops": LOOPS, "learning_rate": 1e-3}
    assert load(convert_file(contents)).config.model.loops == LOOPS


def test_half_precision_weights_are_widened(convert_file):
    contents = original("loop")
    contents["model"] = {name: weight.half() for name, weight in contents["model"].items()}
    check_same_model(convert_file(contents), contents)


def test_the_name_is_the_folders_or_the_given_one(tmp_path, convert_file):
    assert convert._name_of(tmp_path / "..my run (2)") == "my-run--2-"
    assert convert._name_of(Path("/")) == "imported"
    assert load(convert_file(original("gpt"), "--name", "old")).config.name == "old"


def test_the_programs_accept_each_other(tmp_path, convert_file, monkeypatch):
    path, folder = tmp_path / "ckpt.pt", tmp_path / "run"
    torch.save(original("loop"), path)
    command = [sys.executable, "-m", "spak_jax.convert", str(path), str(folder)]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert "imported LoopLM-4" in finished.stdout and "step 15,000" in finished.stdout
    results = tmp_path / "results.json"
    options = ["--lengths", "1", "--examples", "2", "--json", str(results)]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), *options])
    run_program(evaluate.main)
    assert results.exists()


# What is refused.


def changed(kind: str, key: str, **changes) -> dict:
    """An original with changes to one of its dictionaries; None removes."""
    contents = original(kind)
    merged = contents.get(key, {}) | {name.replace("__", "."): v for name, v in changes.items()}
    return contents | {key: {name: value for name, value in merged.items() if value is not None}}


def with_weight(kind: str, name: str, weight) -> dict:
    contents = original(kind)
    return contents | {"model": contents["model"] | {name: weight}}


def test_a_missing_file(refused, tmp_path):
    assert "No such file" in refused(tmp_path / "absent.pt")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello\n" * 50, bytes(range(256)) * 4])
def test_no_torch_file(content, refused, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    assert "damaged or no PyTorch checkpoint" in refused(path)


def test_a_file_cut_short(refused, tmp_path):
    path = tmp_path / "cut.pt"
    torch.save(original("loop"), path)
    path.write_bytes(path.read_bytes()[:5_000])
    assert "damaged or no PyTorch checkpoint" in refused(path)


class Payload:
    """Makes a folder when it is unpickled by a reader that runs what it is given."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_not_run(modern, refused, tmp_path):
    path, trace = tmp_path / "code.pt", tmp_path / "was-here"
    contents = original("loop") | {"config": Payload(trace)}
    torch.save(contents, path, _use_new_zipfile_serialization=modern)
    assert "mkdir" in refused(path)
    assert not trace.exists()
    # The payload is live: a reader that trusts the file runs it.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("key", ["model", "model_args"])
def test_a_missing_part(key, refused):
    contents = original("loop")
    del contents[key]
    assert f"{key} is missing" in refused(contents)
    assert f"{key} is no dictionary" in refused(contents | {key: [1, 2]})


def test_a_file_of_something_else(refused, tmp_path):
    path = tmp_path / "list.pt"
    torch.save([torch.ones(3)], path)
    assert "expected a dictionary" in refused(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt", "transformer.h.1.attn.c_attn.weight"),
        ("gpt", "transformer.wte.weight"),
        ("loop", "transformer.h.mlp.c_fc.weight"),
        ("loop", "transformer.ln_f.weight"),
    ],
)
def test_missing_weights_are_named(kind, name, refused):
    contents = original(kind)
    del contents["model"][name]
    message = refused(contents)
    assert name in message and "missing" in message


def test_a_looped_model_without_its_step_embedding(refused):
    contents = original("loop")
    del contents["model"]["step_embedding.weight"]
    assert "step_embedding.weight are missing" in refused(contents)


def test_unknown_weights_are_named(refused):
    message = refused(with_weight("loop", "transformer.wpe.weight", torch.ones(64, WIDTH)))
    assert "transformer.wpe.weight are unknown" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt", "transformer.h.2.mlp.c_proj.weight"), ("loop", "transformer.h.attn.c_attn.weight")],
)
def test_misshaped_weights_are_named(kind, name, refused):
    weight = original(kind)["model"][name]
    message = refused(with_weight(kind, name, weight.T.contiguous()))
    assert name in message and str(list(weight.T.shape)) in message
    assert str(list(weight.shape)) in message


@pytest.mark.parametrize("value", [torch.ones(WIDTH, dtype=torch.int64), torch.tensor(1.0), 3])
def test_what_is_no_array_of_numbers(value, refused):
    message = refused(with_weight("loop", "transformer.ln_f.weight", value))
    assert "transformer.ln_f.weight is no plain array" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(value, refused):
    weight = torch.ones(WIDTH, dtype=torch.float64)
    weight[3] = value
    message = refused(with_weight("loop", "transformer.ln_f.weight", weight))
    assert "transformer.ln_f.weight" in message and "not finite" in message


def test_biases(refused):
    assert "model_args.bias" in refused(changed("gpt", "model_args", bias=True))
    name = "transformer.h.0.ln_1.bias"
    assert name in refused(with_weight("gpt", name, torch.zeros(WIDTH)))


def test_a_head_of_its_own(refused):
    head = original("loop", seed=1)["model"]["transformer.wte.weight"]
    assert "lm_head.weight differs" in refused(with_weight("loop", "lm_head.weight", head))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("gpt", {"vocab_size": 50_304}, "vocab_size = 50304"),
        ("gpt", {"n_layer": 12}, "n_layer = 12"),
        ("gpt", {"n_embd": None}, "n_embd is missing"),
        ("gpt", {"n_embd": 64}, "expected ["),
        ("loop", {"n_head": 3}, "model.heads = 3"),
        ("loop", {"n_head": "two"}, "model.heads = 'two'"),
        ("loop", {"use_swiglu": True}, "mlp.w1.weight"),
        ("loop", {"dropout": 1.5}, "dropout = 1.5"),
    ],
)
def test_arguments_that_fit_no_model(kind, changes, expected, refused):
    assert expected in refused(changed(kind, "model_args", **changes))


def test_numbers_that_contradict_the_weights(refused):
    assert "step_embedding.weight has the shape" in refused(original("loop") | {"num_loops": 5})
    assert "iter_num = -1" in refused(original("loop") | {"iter_num": -1})
    assert "iter_num = 'x'" in refused(original("loop") | {"iter_num": "x"})


def test_injection_that_cannot_be(refused):
    assert "no loops" in refused(original("gpt"), "--inject-input")
    contents = original("loop") | {"config": {"inject_x0": False}}
    assert "inject_x0 is False" in refused(contents, "--inject-input")


def test_an_invalid_name(refused):
    assert "name = 'a/b'" in refused(original("gpt"), "--name", "a/b")


def test_without_torch(refused, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    torch.save(original("gpt"), path)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refused(path)


def test_a_run_folder_with_checkpoints(convert_file, refused, capsys):
    convert_file(original("gpt"))
    capsys.readouterr()
    assert "already holds checkpoints" in refused(original("gpt"))
