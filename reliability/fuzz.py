"""Readers under hostile input: `python -m reliability.fuzz [READER ...] [--count N] [--json FILE]`.

What a file says is data: a reader takes it, or refuses it with the one error that it documents, in
one line. It runs nothing that stands there, and opens nothing but the file and what lies beside it.
Hypothesis makes the inputs, most of them from something valid, and makes those smaller that break
that; it comes with `pip install -e '.[test]'`.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reliability.campaigns import found_before, named
from spak_jax import config, provenance
from spak_jax.command_line import (
    Failure,
    InputError,
    check_range,
    console,
    parse_lengths,
    progress,
    run_program,
    write_file,
)
from spak_jax.config_files import shipped_configs
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.evaluation.problems_file import read_problems
from spak_jax.evaluation.results import read_results
from spak_jax.evaluation.score import training_curve
from spak_jax.interop import torch_checkpoint
from spak_jax.registry import TASKS
from spak_jax.reports import grouping, tables
from spak_jax.specs import claims, language
from spak_jax.tasks import Task
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import checkpoint, loggers, run_folder
from spak_jax.training.named_arrays import digest

CONFIGS = shipped_configs()
RESULTS = Path("figures/reproduced-256/results/loop12-seed0.json")
# Of the inputs that `--count` asks for: what takes a hundred times longer gets fewer.
SHARES = {"checkpoints": 0.05, "pytorch": 0.1}
# An input that takes longer is a way to hold a program up.
SECONDS_AN_INPUT = 10.0
# Beyond what the process has at first: a file may ask for more than there is.
MEMORY = 8 * 2**30

# Bytes that mean something to one of the readers, and values that are often forgotten.
ODD_BYTES = [
    *(b"\x00", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b'"', b"'''", b"\\", b"\\u0000"),
    *(b"{", b"}", b"[", b"]", b"[[", b"=", b":", b",", b"#", b"-", b".", b"*", b"{}", b"[]"),
    *(b"nan", b"-inf", b"1e999", b"NaN", b"null", b"true", b"0x1F", b"1979-05-27", b"../" * 9),
    *(b"9" * 5_000, b"[" * 2_000, b"a." * 2_000 + b"a=1\n", b"a=0x" + b"9" * 5_000, b'{"a":' * 500),
]
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), "", "a", "x" * 10_000, "\x00", "\ud800", "\u202e", "1e9"),
    *("../../etc/passwd", "/etc/passwd", "~", "$(id)", "__import__('os')", [], {}, [[]], [0] * 999),
    *({"": ""}, {"__class__": "x"}, {"kind": "gpt"}),
]
# What nothing here may do while it reads.
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("pickle.find_class", "socket.connect", "os.remove", "os.rename", "os.rmdir", "os.link"),
)


class Reader(NamedTuple):
    """inputs: a Hypothesis strategy. read: takes one; raises as `errors` what it refuses."""

    inputs: Any
    read: Callable[[Any], object]
    errors: tuple[type[Exception], ...] = (InputError,)


class Found(NamedTuple):
    """What became of a reader's inputs. broken: the smallest input that broke it, and how."""

    reader: str
    tried: int
    taken: int
    refused: int
    slowest_seconds: float
    broken: str | None


def fuzz(name: str, count: int, seed: int) -> Found:
    """Gives a reader about `count` inputs."""
    import hypothesis

    tally = {"taken": 0, "refused": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](hypothesis.strategies, Path(folder))
        watched = _watch(Path(folder))

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
        )
        @hypothesis.given(reader.inputs)
        def attempt(given):
            # Of this process: another one's work is no fault of a reader.
            started = time.process_time()
            try:
                with watched():
                    reader.read(given)
                tally["taken"] += 1
            except reader.errors as error:
                tally["refused"] += 1
                message = str(error)
                assert message and "\n" not in message.strip(), f"not one line: {message!r}"
            bar.advance()
            took = time.process_time() - started
            tally["slowest"] = max(tally["slowest"], took)
            assert took < SECONDS_AN_INPUT, f"took {took:.1f} s"

        broken = None
        try:
            with progress(name, count, unit="inputs") as bar:
                attempt()
        except Exception as error:  # noqa: BLE001  whatever else comes out is what we look for
            notes = " ".join(" ".join(getattr(error, "__notes__", [])).split())
            broken = f"{type(error).__name__}: {error} {notes}"[:2_000]
    tried = tally["taken"] + tally["refused"] + (broken is not None)
    return Found(name, tried, tally["taken"], tally["refused"], tally["slowest"], broken)


def specifications(st, folder: Path) -> Reader:
    """TOML files, from those that ship."""
    path = folder / "fuzzed.toml"
    shipped = [file.read_bytes() for file in sorted(CONFIGS.rglob("*.toml"))]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        config.read_specification(path)

    texts = st.sampled_from(shipped).flatmap(lambda content: _edited(st, content))
    return Reader(texts | st.binary(max_size=200), read)


def configurations(st, folder: Path) -> Reader:
    """Nested values, as checkpoints and results files store them."""
    valid = config.read_config(CONFIGS / "quickstart.toml").model_dump(mode="json")
    return Reader(
        _altered(st, valid) | _values(st), lambda values: config.parse_config(values, "fuzz")
    )


def overrides(st, folder: Path) -> Reader:
    """What the command line takes after the configuration."""
    path = CONFIGS / "quickstart.toml"
    keys = [key for key, _ in config.leaves(config.read_config(path).model_dump(mode="json"))]
    keys += ["parallel.data", "system.name", "invariant", "kernels.a.b.c", "fact", "model", "x"]
    written = st.sampled_from(["=", "={}", "=[]", "=[[]]", "=''", "=1", "=-1", "=nan", "=true"])
    odd = st.sampled_from(ODD_BYTES).map(lambda value: "=" + value.decode("latin-1"))
    pieces = st.tuples(st.sampled_from(keys), written | odd | st.text(max_size=12))
    override = pieces.map("".join) | st.text(max_size=30)
    return Reader(
        st.lists(override, min_size=1, max_size=3), lambda given: config.read_config(path, given)
    )


def lengths(st, folder: Path) -> Reader:
    """`--lengths`."""
    pieces = st.sampled_from([*"0123456789,,-- ", "12", "1-12", "9" * 10_000, "²", "٣", "\n"])
    texts = st.lists(pieces, max_size=8).map("".join) | st.text(max_size=12)
    return Reader(texts, lambda text: parse_lengths("--lengths", text, MAX_LENGTH))


def problems(st, folder: Path) -> Reader:
    """Problem files, of every task."""
    path = folder / "fuzzed.txt"
    numbers = st.from_regex(r"[0-9]{1,4}", fullmatch=True) | st.sampled_from(["9" * 10_000, "0"])
    lines = st.tuples(
        numbers,
        st.sampled_from(["+", "-", "=", "+-", " + "]),
        numbers,
        st.sampled_from(["\n", "", "=1\n", "+2\n", "\r\n", " \n", "\x85\n"]),
    ).map(lambda parts: "".join(parts).encode())
    contents = st.lists(lines | st.binary(max_size=8), max_size=4).map(b"".join)

    def read(given: tuple[bytes, Task]) -> None:
        content, task = given
        path.write_bytes(content)
        read = read_problems(str(path), task)
        assert read and all(len(each) == task.inputs for each in read)

    every = [TASKS.get(name)() for name in TASKS.names()]
    return Reader(st.tuples(contents, st.sampled_from(every)), read)


def results_files(st, folder: Path) -> Reader:
    """Results files, up to the table of what they hold."""
    path, valid = folder / "fuzzed.json", json.loads(RESULTS.read_bytes())
    # Few of everything, so that what is changed matters.
    valid["lengths"] = dict(list(valid["lengths"].items())[:2])
    valid["training"] = {key: [] for key in valid["training"]}
    written = json.dumps(valid).encode()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        evaluated, _ = grouping.gather([(path, read_results(path))] * 2)
        for families in (
            grouping.loop_families,
            grouping.training_families,
            grouping.scheme_families,
        ):
            families(evaluated)
        tables.markdown_table(evaluated)

    altered = _altered(st, valid).map(lambda values: json.dumps(values).encode())
    return Reader(altered | _edited(st, written), read)


def metrics_files(st, folder: Path) -> Reader:
    """The metrics of a run, up to its training curve."""
    line = loggers.Line(loss=1, step=2, learning_rate=3, seconds_per_step=4, validation_loss=5)
    valid = (json.dumps(line.model_dump()) + "\n").encode()
    altered = _altered(st, line.model_dump()).map(lambda each: json.dumps(each).encode() + b"\n")
    contents = st.lists(altered | st.just(valid) | _edited(st, valid), max_size=3).map(b"".join)

    def read(content: bytes) -> None:
        (folder / loggers.METRICS).write_bytes(content)
        training_curve(folder)

    return Reader(contents, read)


def expressions(st, folder: Path) -> Reader:
    """Checks of invariants, as specifications hold them."""
    leaves = st.sampled_from(
        [
            *("1", "0", "0.5", "9" * 400, "1e999", "a.b", 'a["b"]', "x", "True", '"text"', "()"),
            *("a.__class__", "__import__('os')", "lambda: 1", "[1]", "a[b]", "1j", "b'x'", "..."),
        ]
    )
    signs = ["+", "-", "*", "/", "//", "%", "**", "<", "==", "!=", "and", "or", ",", "in", ":="]
    whole = st.recursive(
        leaves,
        lambda inner: (
            st.tuples(inner, st.sampled_from(signs), inner).map(" ".join)
            | st.tuples(st.sampled_from(["max", "min", "len", "not ", "-", "a", ""]), inner).map(
                lambda parts: f"{parts[0]}({parts[1]})"
            )
        ),
        max_leaves=6,
    )
    comparison = st.tuples(whole, st.sampled_from(["<", "==", ">="]), whole).map(" ".join)
    broken = st.tuples(comparison, st.integers(0, 30), st.sampled_from(["", ")", "(", "\x00", "#"]))
    cut = broken.map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :])

    def read(text: str) -> None:
        language.parse(text).check(lambda path: (1, 2.5, "text", (1, 2), True)[len(path) % 5])

    return Reader(
        comparison | whole | cut | st.text(max_size=40),
        read,
        (language.ExpressionError, language.Impossible),
    )


def evidence(st, folder: Path) -> Reader:
    """Patterns of files that a fact names, from a project's folder of configurations."""
    project = folder / "project"
    (project / "configs").mkdir(parents=True)
    (project / "data.json").write_text("{}")
    (folder / "secret.json").write_text("{}")
    (project / "link.json").symlink_to(folder / "secret.json")
    (project / "outside").symlink_to(folder)
    parts = st.sampled_from(["..", "*", "**", "data.json", "outside", "link.json", "secret.json"])
    patterns = st.lists(parts, max_size=6).map("/".join) | st.text(max_size=12)
    absolute = st.sampled_from([str(folder / "secret.json"), "/etc/passwd", "~/x", "//", "C:\\x"])

    def read(pattern: str) -> None:
        claims.evidence("fuzz", pattern, project / "configs")

    return Reader(patterns | absolute, read)


def checkpoints(st, folder: Path) -> Reader:
    """Any file of a checkpoint; what is read must be what was saved."""
    saved = config.read_config(CONFIGS / "quickstart.toml")
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    run = checkpoint.Run(folder / "run")
    run.save(1, saved, weights, {"c": np.zeros(3, np.float32)})
    run.close()
    newest = folder / "run" / run_folder.CHECKPOINTS / "1"
    files = {path: path.read_bytes() for path in sorted(newest.rglob("*")) if path.is_file()}
    texts = {path: _as_json(content) for path, content in files.items()}

    def changed(path: Path):
        edited = _edited(st, files[path])
        if texts[path] is None:
            return edited
        return edited | _altered(st, texts[path]).map(lambda values: json.dumps(values).encode())

    def read(given: tuple[Path, bytes]) -> None:
        path, content = given
        path.write_bytes(content)
        try:
            found = checkpoint.restore(folder / "run", optimizer=True)
            same = digest(found.weights) == digest(weights)
            assert same and found.config == saved, "something else than was saved"
        finally:
            path.write_bytes(files[path])

    inputs = st.sampled_from(list(files)).flatmap(
        lambda path: st.tuples(st.just(path), changed(path))
    )
    return Reader(inputs, read)


def original() -> dict[str, Any]:
    """What the original system saves of the smallest LoopLM; needs PyTorch."""
    import torch

    width = 4
    tensors = {
        "transformer.wte.weight": torch.ones(len(Addition().vocabulary), width),
        "transformer.ln_f.weight": torch.ones(width),
        "step_embedding.weight": torch.ones(1, width),
        "transformer.h.ln_1.weight": torch.ones(width),
        "transformer.h.attn.c_attn.weight": torch.ones(3 * width, width),
        "transformer.h.attn.c_proj.weight": torch.ones(width, width),
        "transformer.h.ln_2.weight": torch.ones(width),
        "transformer.h.mlp.c_fc.weight": torch.ones(4 * width, width),
        "transformer.h.mlp.c_proj.weight": torch.ones(width, 4 * width),
    }
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": width, "bias": False, "dropout": 0.1}
    return {"model": tensors, "model_args": arguments, "iter_num": 3, "num_loops": 1, "config": {}}


def pytorch(st, folder: Path) -> Reader:
    """PyTorch checkpoints: the whole file, the pickle in it, and what that holds."""
    import torch

    valid = original()

    def written(contents: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        return buffer.getvalue()

    def with_pickle(pickled: bytes) -> bytes:
        """The file whose pickle is another, its checksums right."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
        return buffer.getvalue()

    whole, path = written(valid), folder / "fuzzed.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        pickled = file.read(next(n for n in file.namelist() if n.endswith("/data.pkl")))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        original = torch_checkpoint.read_original(path)
        torch_checkpoint.translate(original, torch_checkpoint.describe(original, "fuzz", False))

    globals_ = st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"\x93"])
    return Reader(
        _altered(st, valid).map(written)
        | _edited(st, pickled, globals_).map(with_pickle)
        | _edited(st, whole),
        read,
    )


READERS: dict[str, Callable[[Any, Path], Reader]] = {
    "specifications": specifications,
    "configurations": configurations,
    "overrides": overrides,
    "lengths": lengths,
    "problems": problems,
    "results": results_files,
    "metrics": metrics_files,
    "expressions": expressions,
    "evidence": evidence,
    "checkpoints": checkpoints,
    "pytorch": pytorch,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reliability.fuzz", description="Give hostile input to what reads files."
    )
    parser.add_argument(
        "readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)} (all)"
    )
    parser.add_argument("--count", type=int, default=1_000, help="inputs for each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write what became of them; what FILE holds of other readers stays",
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("hypothesis") is None:
        raise InputError("Hypothesis makes the inputs: pip install -c constraints.txt -e '.[test]'")
    names = named(arguments.readers, READERS)
    check_range("--count", arguments.count, 1, 10_000_000)
    origin = provenance.where_and_when() | {
        "hypothesis": importlib.metadata.version("hypothesis"),
        "seed": arguments.seed,
    }
    found = found_before(arguments.json, READERS, Found._fields) if arguments.json else {}
    _limit_memory()
    for name in names:
        if name == "pytorch" and importlib.util.find_spec("torch") is None:
            console.print("pytorch: not tried, PyTorch is not installed")
            continue
        count = max(1, int(SHARES.get(name, 1.0) * arguments.count))
        each = fuzz(name, count, arguments.seed)
        broken = f"; BROKEN by {each.broken}" if each.broken else ""
        console.print(
            f"{name}: {each.tried:,} inputs, {each.taken:,} taken, {each.refused:,} refused,"
            f" slowest {each.slowest_seconds:.2f} s{broken}",
        )
        found[name] = each._asdict() | origin
        if arguments.json:
            write_file(arguments.json, json.dumps(found, indent=1) + "\n")
    print(table(found))
    broken = [name for name, each in found.items() if each["broken"]]
    if broken:
        raise Failure(f"broken: {', '.join(broken)}")


def table(by_reader: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the inputs, in Markdown."""
    found = [
        Found(*(by_reader[name][key] for key in Found._fields))
        for name in READERS
        if name in by_reader
    ]
    lines = [
        "| reader | inputs | taken | refused | slowest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {each.reader} | {each.tried:,} | {each.taken:,} | {each.refused:,}"
        f" | {each.slowest_seconds:.2f} s |"
        for each in found
    ]
    return "\n".join([*lines, f"| all | {sum(each.tried for each in found):,} | | | |"])


def _edited(st, content: bytes, pieces=None):
    """`content` with a few bytes here and there cut out or replaced."""
    odd = st.sampled_from(ODD_BYTES) | st.binary(max_size=8)
    odd = odd if pieces is None else odd | pieces
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 24), odd)

    def apply(edits: Sequence[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for place, cut, piece in edits:
            changed = changed[:place] + piece + changed[place + cut :]
        return changed

    return st.lists(edit, min_size=1, max_size=3).map(apply)


def _altered(st, values: Any):
    """Nested values with one or two of them replaced, or left out."""
    places = list(_places(values))
    change = st.tuples(st.sampled_from(places), _values(st) | st.just(_LEFT_OUT))

    def apply(changes) -> Any:
        changed = values
        for place, value in changes:
            changed = _with(changed, place, value)
        return changed

    return st.lists(change, min_size=1, max_size=2).map(apply)


_LEFT_OUT = object()


def _values(st):
    return st.recursive(
        st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "kind", "width", "name", "1", ""]), inner)
        ),
        max_leaves=5,
    )


def _places(values: Any, place: tuple = ()) -> Iterator[tuple]:
    """Where values stand in nested ones, by keys."""
    if place:
        yield place
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _places(value, (*place, key))


def _with(values: Any, place: tuple, value: Any) -> Any:
    """`values` with another one at a place; as they are where that is gone."""
    if not place:
        return value
    key, *rest = place
    if not isinstance(values, dict) or key not in values:
        return values
    if not rest and value is _LEFT_OUT:
        return {k: v for k, v in values.items() if k != key}
    return values | {key: _with(values[key], tuple(rest), value)}


def _as_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _watch(folder: Path) -> Callable[[], contextlib.AbstractContextManager]:
    """Within what it returns nothing may be opened but files of `folder` and of the programs."""
    roots = (folder, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1])
    roots = tuple({str(each) for root in roots for each in (root, root.resolve())})
    broken: list[str] = []
    watching = False

    def hook(event: str, given: tuple) -> None:
        if not watching:
            return
        if event in FORBIDDEN:
            broken.append(f"{event} {given!r}"[:200])
        if event == "open" and isinstance(given[0], str | bytes | Path):
            path = Path(given[0].decode() if isinstance(given[0], bytes) else given[0])
            if not str(path.resolve()).startswith(roots) and path != Path("/dev/null"):
                broken.append(f"open {path}")

    sys.addaudithook(hook)

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        nonlocal watching
        watching = True
        try:
            yield
        finally:
            watching = False
            happened, broken[:] = list(broken), []
            # Even where it came to nothing and the reader refused its input for it.
            assert not happened, f"it did {happened[0]}"

    return watched


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


if __name__ == "__main__":
    run_program(main)
