"""Which kernels a program runs on the GPU, how often and how long."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernels(run: Callable[[], None], repeats: int) -> list[dict[str, Any]]:
    """The kernels of one repeat, the longest first.

    Args:
      run: makes `repeats` repeats of what is looked at, and returns when they are done.
      repeats: what counts and times are divided by.

    Returns:
      For each name, without the number that the compiler ends it with: `name`, `count` and
      `microseconds` in all.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)
    return _summed(events["traceEvents"] if isinstance(events, dict) else events, repeats)


def _summed(events: list[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """What ran on the GPU's streams, by name."""
    names = {
        (event["pid"], event.get("tid") if event["name"] == "thread_name" else None): event["args"][
            "name"
        ]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("thread_name", "process_name")
    }
    counts, times = collections.Counter(), collections.Counter()
    for event in events:
        on_gpu = "GPU" in names.get((event.get("pid"), None), "")
        stream = "Stream" in names.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and on_gpu and stream:
            name = re.sub(r"[._]+\d*$", "", re.sub(r"[._]\d+", "", event["name"]))
            counts[name] += 1
            times[name] += event["dur"]
    return [
        {"name": name, "count": counts[name] / repeats, "microseconds": time / repeats}
        for name, time in times.most_common()
    ]
