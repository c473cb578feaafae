"""The bench of whole configurations, and the PyTorch model that it compares with."""

import json
import tomllib

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, assert_refused, run_program
from flax import nnx

from pallas_kernels import compile
from spak_jax import addition, checkpoint, model, profiling, roofline, train
from spak_jax.config import parse_config, read_config


def test_training_and_scoring_are_timed(tiny_toml, tmp_path):
    file = tmp_path / "times.json"
    result = run_program(
        "spak_jax.bench", tiny_toml, "train.seeds=2", "--attention", "xla", "--json", file
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(file.read_text())
    times = results["milliseconds_a_step"]["xla"]
    assert 0 < times["low"] <= times["median"] <= times["high"]
    assert results["milliseconds_a_seed"]["xla"] == times["median"] / 2
    assert results["batch"] == [8, 24] and results["device"] == "cpu"
    assert results["tokens_a_second"]["xla"] == pytest.approx(2 * 8 * 24e3 / times["median"])
    assert results["scored_problems_a_second"]["ours"] > 0
    assert results["temporary_bytes"]["xla"] > 0
    assert "PyTorch" in results["no_peer"] and "no PyTorch peer" in result.stdout


def test_an_implementation_that_cannot_train_is_named(tiny_toml):
    result = run_program("spak_jax.bench", tiny_toml, "--attention", "cudnn")
    assert_refused(result, "--attention", "cudnn", "dropout")


@pytest.mark.parametrize("name", ["loop12", "gpt12"])
def test_operations_of_a_step(name):
    """Six for each weight of a block, loop and token, and a few percent."""
    config = read_config(ROOT / "configs" / f"{name}.toml", [])
    of_weights = 6 * (128 * 64) * 12 * 786_432
    assert of_weights * 1.02 < roofline.operations_a_step(config) < of_weights * 1.05


@pytest.mark.parametrize("kind", ["loop", "gpt"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_peer_is_the_same_model(kind, mlp):
    torch = pytest.importorskip("torch")
    from spak_jax import torch_peer

    depth = {"layers": 3} if kind == "gpt" else {"loops": 3, "inject_input": mlp == "gelu"}
    sizes = {"width": 16, "heads": 2, "mlp": mlp, "dropout": 0.0, "dtype": "float32"}
    values = tomllib.loads(TINY) | {"system": "Tiny", "model": {"kind": kind, **sizes, **depth}}
    config = parse_config(values, "tiny")
    state = jax.jit(lambda: train.initial_state(config))()
    peer = torch_peer.Peer(config, addition.VOCABULARY_SIZE)
    peer.load(jax.tree.map(np.asarray, checkpoint.named_arrays(state.weights)))
    batch = addition.training_batch(jax.random.key(1), config.data, 8, None)
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)
    ours = train.loss(nnx.merge(definition, state.weights), batch, None)
    weights = batch.answer / batch.answer.sum()
    tokens, targets, weights = (
        torch.from_numpy(np.array(x)) for x in (batch.tokens, batch.targets, weights)
    )
    theirs = peer.loss(tokens.long(), targets.long(), weights)
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert sum(p.numel() for p in peer.parameters()) == model.parameter_count(state.weights)


try:
    compile.check_plugin()
    MISSING = None
except compile.Unavailable as error:
    MISSING = str(error)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(tiny_toml, tmp_path):
    file = tmp_path / "estimate.json"
    words = "model.width=128", "data.row_length=64", "--target", "rtx5070", "--json", file
    result = run_program("spak_jax.bench", tiny_toml, *words)
    assert result.returncode == 0, result.stderr
    assert "Estimate, not a measurement" in result.stdout
    results = json.loads(file.read_text())
    assert results["estimate"] and results["target"] == "rtx5070"
    assert 0 < results["bytes_held"] < results["memory_bytes"]
    assert results["least_milliseconds_by_operations"] > 0


def test_kernels_are_summed_by_name():
    track = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream #1"}},
        {"ph": "M", "name": "process_name", "pid": 3, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 3, "tid": 2, "args": {"name": "Stream #1"}},
    ]
    run = lambda name, pid, dur: {"ph": "X", "name": name, "pid": pid, "tid": 2, "dur": dur}  # noqa: E731
    events = [run("fusion_1", 1, 3.0), run("fusion_2", 1, 5.0), run("gemm", 1, 20.0)]
    events += [run("fusion_3", 3, 100.0)]
    assert profiling._summed(track + events, 2) == [
        {"name": "gemm", "count": 0.5, "microseconds": 10.0},
        {"name": "fusion", "count": 1.0, "microseconds": 4.0},
    ]
