"""How fast a model writes answers: with caches, and recomputing in one launch or block by block.

`python -m benchmarks.models CONFIG --generation`: many problems at once, one alone, and one long
one where the configuration is scored on such. Weights are initial ones, on which times do not
depend; what they would write they never learned to end, so every way writes the true answers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.tuning import timing
from spak_jax import models, provenance, tasks
from spak_jax.command_line import Table, console
from spak_jax.config import Config
from spak_jax.config_sections import LoopedModel
from spak_jax.evaluation import generate
from spak_jax.evaluation.batching import padded_length

# Problems, their digits, and tokens of a row.
MANY, ONE = (128, 12, 64), (1, 12, 64)
LONG_DIGITS = 100
ROUNDS = 5
CACHES = "caches"
LAUNCHED, SCANNED = "recomputing, one launch", "recomputing, block by block"


def measure(config: Config) -> dict[str, Any]:
    """Times of every way that runs here."""
    cases = [MANY, ONE]
    if LONG_DIGITS in config.evaluation.lengths:
        cases.append((1, LONG_DIGITS, padded_length(LONG_DIGITS, tasks.of(config.data))))
    return {
        **provenance.where_and_when(),
        "dtype": models.compute_dtype(config.model.dtype).name,
        "cases": [_timed(config, *case) for case in cases],
    }


def show(results: dict[str, Any]) -> None:
    """A table for people: for each way a row of each case."""
    table = Table("problems", "way", "ms", "quartiles", "tokens/s")
    for case in results["cases"]:
        for name, times in case["milliseconds"].items():
            table.add_row(
                f"{case['rows']} of {case['digits']} digits, rows of {case['length']} tokens",
                name + (" (taken)" if name == case["taken"] else ""),
                f"{times['median']:.2f}",
                f"{times['low']:.2f} to {times['high']:.2f}",
                f"{case['tokens_a_second'][name]:,.0f}",
            )
    console.print(table)
    console.print(f"{results['config']}, {results['dtype']} on {results['device']}")
    missing = {
        (name, reason): case["length"]
        for case in reversed(results["cases"])
        for name, reason in case["missing"].items()
    }
    for (name, reason), length in missing.items():
        console.print(f"no {name}, rows of {length} tokens and more: {reason}")


def _timed(config: Config, rows: int, digits: int, length: int) -> dict[str, Any]:
    """Quartiles of the milliseconds that answers take by each way, taking turns."""
    task = tasks.of(config.data)
    problems = task.sample_exact(jax.random.key(1), digits, rows)
    text, answer = task.render(problems, length)
    network = models.build(config, jax.random.key(0))
    programs, missing = {}, {}
    for name, make in {CACHES: _caches, LAUNCHED: _launched, SCANNED: _scanned}.items():
        decoder = make(config, network, text)
        if isinstance(decoder, str):
            missing[name] = decoder
        else:
            programs[name] = _program(decoder, task.end, nnx.state(network), text, answer)
    milliseconds = timing.quartiles(programs, ROUNDS, 1e3)
    written = int(answer.sum())
    recomputing = SCANNED if LAUNCHED in missing else LAUNCHED
    picked = generate.pick_decoder(config.model, text.shape, None)
    return {
        "rows": rows,
        "digits": digits,
        "length": length,
        "tokens": written,
        "taken": CACHES if picked == generate.WITH_CACHE else recomputing,
        "milliseconds": milliseconds,
        "tokens_a_second": {
            name: written / times["median"] * 1e3 for name, times in milliseconds.items()
        },
        "missing": missing,
    }


def _program(decoder: generate.Decoder, end: int, weights, text, answer) -> timing.Program:
    """A program that writes the answers once, compiled."""

    def decode_step(given, tokens, cache_position, cache):
        weights, text = given
        logits, loops, cache = decoder.decode_step(weights, tokens, cache_position, cache)
        # The logits still decide, for all that the compiler knows.
        truth = jax.nn.one_hot(text[jnp.arange(len(text)), cache_position + 1], logits.shape[-1])
        return logits + 1e9 * truth, loops, cache

    true = generate.Decoder(lambda given, tokens: decoder.prefill(given[0], tokens), decode_step)

    @jax.jit
    def write(given, prompt, prompt_length):
        return generate.generate(true, end, given, prompt, prompt_length)[0]

    given = ((weights, text), text, answer.argmax(-1))
    executable = write.lower(*given).compile()
    return timing.Program(lambda: jax.block_until_ready(executable(*given)), 1)


# Each is the decoder of that name, or why there is none.


def _caches(config: Config, network, text) -> generate.Decoder:
    return generate.with_cache(config)


def _launched(config: Config, network, text) -> generate.Decoder | str:
    if not isinstance(config.model, LoopedModel):
        return f"{config.model.described} has no loops"
    if jax.default_backend() != "gpu":
        return "no GPU that it is for"
    if not network.supports_fused(text):
        return "no program holds such rows"
    return _recomputing(
        config, network, lambda network, **inputs: network.fused_forward(**inputs)[0]
    )


def _scanned(config: Config, network, text) -> generate.Decoder:
    # Asked for an implementation of attention, the model does not take one launch.
    attention = "pallas" if jax.default_backend() == "gpu" else None
    network = models.build(config, jax.random.key(0), attention)
    return _recomputing(config, network, lambda network, **inputs: network(**inputs))


def _recomputing(config: Config, network, call: Callable) -> generate.Decoder:
    definition, task = nnx.graphdef(network), tasks.of(config.data)

    def run(weights, tokens):
        inputs = {"tokens": tokens, "position_ids": task.position_ids(tokens)}
        return call(nnx.merge(definition, weights), **inputs), jnp.zeros(tokens.shape, jnp.int32)

    return generate.without_cache(run)
