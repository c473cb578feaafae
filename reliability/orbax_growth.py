"""Does a process grow that does nothing but save with Orbax, and remove what it saved?

`python reliability/orbax_growth.py [--saves N] [--json FILE]`. It needs Orbax and nothing of ours:
a part of the growth that `reliability.soak` sees is not this project's. Each way to save runs in a
process of its own, as memory that has been freed once is taken again.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import psutil

# What is loaded and cached at first is no growth.
WARM_UP = 0.2
ARRAYS = {f"weights_{i}": np.zeros((16, 16), np.float32) for i in range(30)}


def by_numpy() -> Callable[[Path], None]:
    """The control: the same arrays, written by NumPy into one file."""
    return lambda path: np.savez(path, **ARRAYS)


def by_orbax() -> Callable[[Path], None]:
    """One item, by `StandardCheckpointer`."""
    checkpointer = ocp.StandardCheckpointer()

    def save(path: Path) -> None:
        checkpointer.save(path, ARRAYS)
        checkpointer.wait_until_finished()

    return save


def by_orbax_in_three_items() -> Callable[[Path], None]:
    """Weights, optimizer and a description, as a training here saves them."""
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    arrays = ocp.args.StandardSave(ARRAYS)
    items = ocp.args.Composite(
        description=ocp.args.JsonSave({"step": 1}), weights=arrays, optimizer=arrays
    )
    return lambda path: checkpointer.save(path, args=items)


WAYS = {way.__name__: way for way in (by_numpy, by_orbax, by_orbax_in_three_items)}


def grown(name: str, saves: int) -> float:
    """Resident bytes a save, by a straight line through all but the first saves."""
    save, process, memory = WAYS[name](), psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(saves):
            path = Path(folder) / f"{i}.npz"
            save(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            memory.append(process.memory_info().rss)
    later = memory[int(WARM_UP * saves) :]
    return float(np.polyfit(range(len(later)), later, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=2000, help="of each way (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen")
    arguments = parser.parse_args()
    found = {}
    for name in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(grown, (name, arguments.saves))
        print(f"{name}: {found[name] / 1024:.1f} KiB a save, {arguments.saves:,} saves", flush=True)
    if arguments.json:
        place = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        about = {
            "bytes_a_save": found,
            "saves": arguments.saves,
            "orbax": importlib.metadata.version("orbax-checkpoint"),
            "tensorstore": importlib.metadata.version("tensorstore"),
            "device": "cpu",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": subprocess.run(place, capture_output=True, text=True).stdout.strip() or None,
        }
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
