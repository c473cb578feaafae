"""Made-up contents of results files, which the tests of results, tables and figures share."""

import json
from pathlib import Path

from spak_jax.evaluation.results import Results
from spak_jax.reports.grouping import Evaluated, gather

COLUMNS = ("1-4", "5-6", "8", "10", "12")
MANY_LENGTHS = (*range(1, 101), 200, 500, 1000, 10000)

CURVE = {
    "step": [10, 20, 30],
    "loss": [2.5, 1.0, 0.1],
    "validation_step": [30],
    "validation_loss": [0.2],
    "seconds_per_step": 0.1,
}


def score(correct, total=1000, zero_shot=False):
    """An accuracy with an interval of 3 points either way."""
    reach = 0.03
    accuracy = correct / total
    return {
        "correct": correct,
        "total": total,
        "accuracy": accuracy,
        "low": max(0.0, accuracy - reach),
        "high": min(1.0, accuracy + reach),
        "zero_shot": zero_shot,
        "mean_loops": 4.0,
    }


def results(
    name="loop12",
    system="LoopLM-12 (Dynamic)",
    trained=12,
    loops=12,
    seed=0,
    model=None,
    **changes,
):
    """The contents of a results file, as the evaluator writes it.

    model: more keys of the configured model, or others instead.
    """
    kind = {"kind": "loop", "loops": trained} if trained else {"kind": "gpt", "layers": 12}
    made = {
        "system": system,
        "config": {
            "name": name,
            "system": system,
            "model": {"width": 256, **kind, **(model or {})},
            "data": {"max_length": 4, "seed": 0},
            "train": {"steps": 100, "seed": seed},
            "evaluation": {"examples": 1000},
        },
        "parameters": 793_600,
        "step": 100,
        "loops": loops,
        "halting": None,
        "method": "teacher forcing",
        "examples": 1000,
        "seed": 0,
        "dtype": "float32",
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-22",
        "commit": "0123456789abcdef+changes",
        "lengths": {str(n): score(1000 - 80 * n, zero_shot=n > 6) for n in range(1, 13)},
        "published_columns": {
            c: score(999 - 111 * i, zero_shot=i > 0) for i, c in enumerate(COLUMNS)
        },
        "measures": {"carries": {"0": score(500)}},
        "training": {},
    }
    return made | changes


def at_lengths(lengths, correct=500):
    return {str(n): score(correct, zero_shot=n > 6) for n in lengths}


def scheme(positions, window=False, depth=4, looped=True, **changes):
    """A run whose model knows positions so, of as many loops or layers."""
    kind = "LoopLM" if looped else "GPT"
    model = {"positions": positions, "window": window} | ({} if looped else {"layers": depth})
    name, trained = f"{kind}-{depth}, {positions}, {window}", depth if looped else None
    return results(name, name, trained, changes.pop("loops", trained), model=model, **changes)


def written(folder: Path, values, name: str = "results.json") -> Path:
    """A file with these contents, or with this text as it is."""
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def gathered(*contents) -> tuple[list[Evaluated], list[str]]:
    """What `gather` makes of files `0.json`, `1.json` and so on with these contents."""
    files = [(Path(f"{i}.json"), Results.of(values)) for i, values in enumerate(contents)]
    return gather(files)
