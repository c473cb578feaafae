"""The bench of whole configurations, and the PyTorch model that it compares with."""

import json
import tomllib

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, assert_refused, run_program, with_slow
from flax import nnx

from benchmarks import generation, inference, profiling
from pallas_kernels.tuning import aot
from spak_jax import models
from spak_jax.command_line import InputError
from spak_jax.config import parse_config, read_config
from spak_jax.data import training_batch
from spak_jax.models import flops
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training.named_arrays import named_arrays
from spak_jax.training.step import initial_state, loss

ADDITION = Addition()


@pytest.mark.slow
def test_training_and_scoring_are_timed(tiny_toml, tmp_path):
    file = tmp_path / "times.json"
    result = run_program(
        "benchmarks.models", tiny_toml, "train.seeds=2", "--attention", "xla", "--json", file
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
    result = run_program("benchmarks.models", tiny_toml, "--attention", "cudnn")
    assert_refused(result, "--attention", "cudnn", "dropout")


def test_inference_is_timed(tiny, monkeypatch, capsys):
    sizes = {"ROWS": 4, "LENGTH": 16, "LOOPS": (1, 2), "MANY_ROWS": 6, "PASSES": 2, "ROUNDS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(inference, name, value)
    results = inference.measure(tiny)
    inference.show(results)
    assert inference.PLAIN in capsys.readouterr().out
    assert [(entry["rows"], entry["loops"]) for entry in results["latency"]] == [(4, 1), (4, 2)]
    assert (results["throughput"]["rows"], results["throughput"]["loops"]) == (6, 3)
    for entry in (*results["latency"], results["throughput"]):
        times = entry["milliseconds"][inference.PLAIN]
        assert 0 < times["low"] <= times["median"] <= times["high"]
        assert set(entry["missing"]) == {inference.LAUNCHED, inference.SCANNED}
    # 12 width^2 weights of 4 bytes in a block.
    assert results["weight_bytes_a_loop"] == 12 * 16**2 * 4
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("kind", with_slow(["loop", "gpt"], "gpt"))
def test_generation_is_timed(kind, tmp_path, monkeypatch):
    sizes = {"MANY": (3, 2, 12), "ONE": (1, 2, 12), "LONG_DIGITS": 7, "ROUNDS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(generation, name, value)
    depth = "layers = 3" if kind == "gpt" else "loops = 3"
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.replace('"loop"', f'"{kind}"').replace("loops = 3", depth))
    file = tmp_path / "times.json"
    result = run_program("benchmarks.models", config, "--generation", "--json", file)
    assert result.returncode == 0, result.stderr
    assert "caches (taken)" in result.stdout
    results = json.loads(file.read_text())
    assert results["device"] == "cpu" and results["dtype"] == "float32"
    shapes = [(case["rows"], case["digits"], case["length"]) for case in results["cases"]]
    assert shapes == [(3, 2, 12), (1, 2, 12), (1, 7, 32)]
    for case in results["cases"]:
        assert set(case["missing"]) == {generation.LAUNCHED}
        for name in (generation.CACHES, generation.SCANNED):
            times = case["milliseconds"][name]
            assert 0 < times["low"] <= times["median"] <= times["high"]
            expected = case["tokens"] / times["median"] * 1e3
            assert case["tokens_a_second"][name] == pytest.approx(expected)
    # Each sum of two digits takes two or three, and a newline.
    assert 3 * 3 <= results["cases"][0]["tokens"] <= 3 * 4


def test_generation_is_not_estimated(tiny_toml):
    words = "benchmarks.models", tiny_toml, "--generation"
    assert_refused(run_program(*words, "--target", "h100"), "--target", "--generation")
    assert_refused(run_program(*words, "--attention", "xla"), "--attention", "--generation")


def test_only_what_loops_has_inference_timed():
    stack = read_config(ROOT / "configs" / "gpt12.toml", [])
    for refused in (
        inference.measure,
        lambda config: inference.estimate(config, "h100"),
    ):
        with pytest.raises(InputError, match="--inference: gpt12 is a stack"):
            refused(stack)


@pytest.mark.parametrize("name", ["loop12", "gpt12"])
def test_operations_of_a_step(name):
    """Six for each weight of a block, loop and token, and a few percent."""
    config = read_config(ROOT / "configs" / f"{name}.toml", [])
    of_weights = 6 * (128 * 64) * 12 * 786_432
    assert of_weights * 1.02 < flops.operations_a_step(config) < of_weights * 1.05


@pytest.mark.parametrize("kind", ["loop", "gpt"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_peer_is_the_same_model(kind, mlp):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peer

    depth = {"layers": 3} if kind == "gpt" else {"loops": 3, "inject_input": mlp == "gelu"}
    sizes = {"width": 16, "heads": 2, "mlp": mlp, "dropout": 0.0, "dtype": "float32"}
    values = tomllib.loads(TINY) | {"system": "Tiny", "model": {"kind": kind, **sizes, **depth}}
    config = parse_config(values, "tiny")
    state = jax.jit(lambda: initial_state(config))()
    peer = torch_peer.Peer(config, len(ADDITION.vocabulary))
    peer.load(jax.tree.map(np.asarray, named_arrays(state.weights)))
    batch = training_batch(jax.random.key(1), config.data, 8, None)
    definition, _ = models.abstract(config)
    ours = loss(nnx.merge(definition, state.weights), batch, ADDITION, None)
    weights = batch.answer / batch.answer.sum()
    tokens, targets, weights = (
        torch.from_numpy(np.array(x)) for x in (batch.tokens, batch.targets, weights)
    )
    theirs = peer.loss(tokens.long(), targets.long(), weights)
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert sum(p.numel() for p in peer.parameters()) == models.parameter_count(state.weights)


try:
    aot.check_plugin()
    MISSING = None
except aot.Unavailable as error:
    MISSING = str(error)


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(tiny_toml, tmp_path):
    file = tmp_path / "estimate.json"
    words = "model.width=128", "data.row_length=64", "--target", "rtx5070", "--json", file
    result = run_program("benchmarks.models", tiny_toml, *words)
    assert result.returncode == 0, result.stderr
    assert "Estimate, not a measurement" in result.stdout
    results = json.loads(file.read_text())
    assert results["estimate"] and results["target"] == "rtx5070"
    assert 0 < results["bytes_held"] < results["memory_bytes"]
    assert results["least_milliseconds_by_operations"] > 0


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.slow
def test_inference_is_estimated_for_a_gpu_that_is_not_there(tiny_toml, tmp_path):
    file = tmp_path / "estimate.json"
    words = "model.width=64", "--inference", "--target", "rtx5070", "--json", file
    result = run_program("benchmarks.models", tiny_toml, *words)
    assert result.returncode == 0, result.stderr
    assert "Estimate, not a measurement" in result.stdout
    results = json.loads(file.read_text())
    assert results["estimate"] and results["kernel"]["ok"]
    # 2 FLOP a weight and token, a little more for attention and the readout.
    least = 1e3 * 2 * 128 * 64 * 12 * 12 * 64**2 / 61.7e12
    assert least < results["least_milliseconds_by_operations"]["12"] < 1.2 * least


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
