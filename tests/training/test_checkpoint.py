"""Checkpoints: what was saved comes back, and what is damaged does not come back as something."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import assert_refused, run_program, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spak_jax import command_line
from spak_jax.command_line import Failure, InputError
from spak_jax.release import release
from spak_jax.training import checkpoint, run_folder, stored_checkpoint
from spak_jax.training.named_arrays import from_named

WEIGHTS = {
    "block": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "scale": np.ones(3, np.float32),
}
OPTIMIZER = [{"count": np.int32(4)}, (np.full(2, 0.5, np.float32),)]


@pytest.fixture
def run(tmp_path, tiny):
    folder = tmp_path / "run"
    writer = checkpoint.Run(folder)
    for step in (1, 2):
        writer.save(step, tiny, WEIGHTS, OPTIMIZER)
    writer.close()
    return folder


def assert_is_what_was_saved(restored):
    again = from_named(WEIGHTS, restored.weights)
    np.testing.assert_array_equal(again["block"]["kernel"], WEIGHTS["block"]["kernel"])
    np.testing.assert_array_equal(again["scale"], WEIGHTS["scale"])


def test_what_was_saved_comes_back(run, tiny):
    restored = checkpoint.restore(run, optimizer=True)
    assert (restored.step, restored.config) == (2, tiny)
    assert_is_what_was_saved(restored)
    state = from_named(OPTIMIZER, restored.optimizer)
    assert state[0]["count"] == 4 and (state[1][0] == 0.5).all()
    assert checkpoint.restore(run).optimizer is None


def test_only_the_last_checkpoints_are_kept(run, tiny):
    writer = checkpoint.Run(run)
    writer.save(3, tiny, WEIGHTS, OPTIMIZER)
    writer.close()
    assert run_folder.steps_in(run) == [2, 3]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damage_to_any_file_is_an_error_or_harmless(run, tmp_path, damage):
    newest = run / "checkpoints" / "2"
    files = sorted(p.relative_to(run) for p in newest.rglob("*") if p.is_file())
    refused = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        damage(copy / file)
        try:
            assert_is_what_was_saved(checkpoint.restore(copy))
        except InputError as error:
            refused += 1
            assert str(copy / "checkpoints" / "2") in str(error)
            assert "step 1" in str(error) and "\n" not in str(error)
        shutil.rmtree(copy)
    # The arrays and the description, at least, cannot be spared.
    assert refused >= 2


def test_another_configuration_is_not_the_one_that_was_saved(run):
    """Also where the file is as good JSON as before, and from before files had digests."""
    newest = run / "checkpoints" / "2"
    (newest / stored_checkpoint.FILES).unlink()
    [file] = [
        path for path in newest.rglob("*") if path.is_file() and b'"loops"' in path.read_bytes()
    ]
    changed = re.sub(rb'("loops": ?)3', rb"\g<1>4", file.read_bytes())
    assert changed != file.read_bytes() and json.loads(changed)
    file.write_bytes(changed)
    with pytest.raises(InputError, match="checkpoints/2 is damaged.*go back to step 1"):
        checkpoint.restore(run)


def test_a_checkpoint_is_good_only_with_its_optimizer(run):
    """What an error says to go back to must be what a training can go on from."""
    for path in (run / "checkpoints" / "2" / "weights").rglob("d/*"):
        truncate(path)
    for path in (run / "checkpoints" / "1" / "optimizer").rglob("d/*"):
        truncate(path)
    with pytest.raises(InputError, match="checkpoints/2 is damaged.*no earlier one is good"):
        checkpoint.restore(run)


def test_many_arrays_that_cannot_be_read_are_one_message(run):
    for path in (run / "checkpoints" / "2").rglob("d/*"):
        path.write_bytes(b"")
    # In a process of its own: what arrives late is printed by threads that outlive the reading.
    result = run_program("spak_jax.evaluate", run, env=os.environ)
    assert_refused(result, "checkpoints/2 is damaged", "go back to step 1")
    assert len(result.stderr.splitlines()) == 1


# Whatever a file system takes, and often what something reads as more than a name.
NAMES = st.text(
    st.sampled_from("[]*?{}~%$:;|&#@=+,'\"\\<>! \n\t\r.-aé٣漢\x01\u202e\udcff")
    | st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=60,
).filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) < 256)


def assert_survives(path, config):
    writer = checkpoint.Run(path)
    for step in (1, 2):
        writer.save(step, config, WEIGHTS, OPTIMIZER)
    writer.drop_after(1)
    writer.close()
    assert run_folder.steps_in(path) == [1]
    assert_is_what_was_saved(checkpoint.restore(path, optimizer=True))


@settings(max_examples=15, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=3))
@example(["a[b]"])
@example(["[!a]", "**"])
@example(["a\\b", "gs:", "x"])
@example(["\udcff", "-a", "~", "%20", "a."])
@example(["x" * 255] * 12)
def test_a_run_may_have_any_path(names):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, *names)
        # What a pattern would find instead.
        place.with_name("b").mkdir(parents=True)
        assert_survives(place, tiny_config())


def test_without_a_plainly_named_place_nothing_is_begun(tmp_path, monkeypatch, tiny):
    odd = tmp_path / "a[b]"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    writer = checkpoint.Run(odd)
    with pytest.raises(InputError, match="set TMPDIR"):
        writer.save(0, tiny, WEIGHTS)
    with monkeypatch.context() as no_place:
        no_place.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        with pytest.raises(Failure, match="none"):
            writer.save(0, tiny, WEIGHTS)


@pytest.mark.parametrize("read_back", [stored_checkpoint.READ_BACK, 0])
def test_what_does_not_come_back_was_not_saved(run, tmp_path, monkeypatch, read_back, tiny):
    """Orbax drops the arrays of a folder whose name it takes for a pattern, and says nothing."""
    monkeypatch.setattr(stored_checkpoint, "READ_BACK", read_back)
    odd = tmp_path / "a[b]"
    run.rename(odd)
    writer = checkpoint.Run(odd)
    writer.save(3, tiny, WEIGHTS, OPTIMIZER)
    for each in (checkpoint, stored_checkpoint):
        monkeypatch.setattr(each, "plainly_named", contextlib.nullcontext)
    monkeypatch.chdir("/")
    with pytest.raises(Failure, match=r"cannot save .* step 4 .*that of step 3 is kept"):
        writer.save(4, tiny, WEIGHTS, OPTIMIZER)
    monkeypatch.undo()
    assert run_folder.steps_in(odd) == [2, 3]
    assert_is_what_was_saved(checkpoint.restore(odd, optimizer=True))
    # What is left of it goes with the next training.
    checkpoint.Run(odd)
    assert {path.name for path in (odd / run_folder.CHECKPOINTS).iterdir()} == {"2", "3"}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (PermissionError(13, "Permission denied", "weights/d/0"), "weights/d/0: Permission denied"),
        (InterruptedError(4, "Interrupted system call"), "Interrupted system call"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"),
        (ImportError("no module named zarr3"), "no module named zarr3"),
        (TypeError("restore() got an unexpected keyword"), "unexpected keyword"),
        (RuntimeError("RESOURCE_EXHAUSTED: 4 GiB"), "RESOURCE_EXHAUSTED"),
        (ValueError("UNAVAILABLE: the disk is away"), "UNAVAILABLE"),
        (InputError("its configuration: unknown key model.new"), "unknown key model.new"),
    ],
)
def test_only_damage_is_called_damage(run, monkeypatch, error, cause, listed):
    if not listed:
        for path in run.rglob(stored_checkpoint.FILES):
            path.unlink()

    def fails(*rest, **more):
        raise error

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fails)
    with pytest.raises(InputError, match="cannot read the checkpoint .*/2") as refusal:
        checkpoint.restore(run)
    said = str(refusal.value).replace(str(run), "RUN")
    assert cause in said and "\n" not in said
    assert not any(word in said for word in ("damage", "--fresh", "remove"))


def test_files_that_are_as_they_were_saved_are_not_damaged(run, monkeypatch):
    def fails(*rest, **more):
        raise ValueError("NOT_FOUND: a format of tomorrow")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fails)
    with pytest.raises(InputError, match="cannot read .*a format of tomorrow"):
        checkpoint.restore(run)
    # Where nothing says so, it is what such an error mostly means.
    (run / "checkpoints" / "2" / stored_checkpoint.FILES).unlink()
    with pytest.raises(InputError, match="is damaged .*a format of tomorrow"):
        checkpoint.restore(run)


def test_a_file_that_cannot_be_read_is_named(run, monkeypatch):
    flip(next((run / "checkpoints" / "2" / "weights").rglob("d/*")))

    def refused(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.Path, "open", refused)
    with pytest.raises(InputError, match=r"cannot read .*\(.*/2/.*: Permission denied\)$"):
        checkpoint.restore(run)


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_jax_that_cannot_start_is_one_line(run, platforms):
    env = os.environ | {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""}
    result = run_program("spak_jax.evaluate", run, env=env)
    assert result.returncode == 2
    # JAX may have warned of a plugin before it.
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: JAX cannot start on JAX_PLATFORMS={platforms} (")
    assert "JAX_PLATFORMS=cpu is there" in last


def test_any_program_tells_that_jax_cannot_start(monkeypatch, capsys):
    def asserts():
        raise AssertionError

    def main():
        jax.devices()

    with monkeypatch.context() as absent:
        absent.setattr(jax, "devices", asserts)
        with pytest.raises(SystemExit) as end:
            command_line.run_program(main)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: JAX cannot start on JAX_PLATFORMS=cpu")
    # Other bugs stay what they are.
    with pytest.raises(AssertionError):
        command_line.run_program(asserts)


def test_a_reader_that_loses_a_race_looks_again(run, tiny, monkeypatch):
    read, tidied = checkpoint.read, []

    def tidied_meanwhile(folder, *rest):
        if not tidied:
            tidied.append(folder)
            monkeypatch.setattr(checkpoint, "read", read)
            writer = checkpoint.Run(run)
            for step in (3, 4):
                writer.save(step, tiny, WEIGHTS, OPTIMIZER)
            return read(folder, *rest)
        return read(folder, *rest)

    monkeypatch.setattr(checkpoint, "read", tidied_meanwhile)
    assert checkpoint.restore(run).step == 4
    assert [folder.name for folder in tidied] == ["2"]


def test_entries_that_are_no_checkpoints_stay_and_do_not_matter(run, tiny):
    folder = run / run_folder.CHECKPOINTS
    names = ("007", "٣", "0abc", "tmp", "-1", "1e3", "9.partial", "２", " 5")
    for name in names:
        (folder / name).mkdir()
    for name in (".DS_Store", "6", "notes.txt"):
        (folder / name).write_text("mine")
    writer = checkpoint.Run(run)
    writer.save(3, tiny, WEIGHTS, OPTIMIZER)
    assert run_folder.steps_in(run) == [2, 3]
    assert checkpoint.restore(run).step == 3
    left = {path.name for path in folder.iterdir()}
    assert left == {*names, ".DS_Store", "6", "notes.txt", "2", "3"}


def test_what_killed_processes_left_goes(run):
    folder = run / run_folder.CHECKPOINTS
    for name in ("3.unseen", "3.unseen.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-7"):
        (folder / name).mkdir()
    (folder / "0.removed").mkdir()
    checkpoint.Run(run)
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_folders_that_cannot_be_read_are_named(run, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder.os, "scandir", refused)
    with pytest.raises(InputError, match="cannot read .*checkpoints: Permission denied"):
        checkpoint.restore(run)


def test_a_run_folder_may_be_a_link(run, tmp_path, tiny):
    link = tmp_path / "link"
    link.symlink_to(run)
    writer = checkpoint.Run(link)
    writer.save(3, tiny, WEIGHTS, OPTIMIZER)
    assert checkpoint.restore(link).step == checkpoint.restore(run).step == 3


def test_missing_and_empty_runs(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        checkpoint.restore(tmp_path / "none")
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path)


def test_an_unwritable_run_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        checkpoint.Run(tmp_path / "file" / "run")


def test_a_release_holds_the_newest_weights_alone(run, tmp_path, tiny):
    (run / run_folder.RESULTS).write_text("{}")
    out = tmp_path / "out" / "released"
    assert release(run, out) == 2
    restored = checkpoint.restore(out, optimizer=True)
    assert (restored.step, restored.config, restored.optimizer) == (2, tiny, None)
    assert_is_what_was_saved(restored)
    assert (out / run_folder.RESULTS).read_text() == "{}"
    names = {path.name for path in (out / run_folder.CHECKPOINTS).rglob("*")}
    assert run_folder.steps_in(out) == [2] and "optimizer" not in names
    place = str(tmp_path).encode()
    assert not any(place in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with pytest.raises(InputError, match="released exists"):
        release(run, out)
    with pytest.raises(InputError, match="no run folder"):
        release(tmp_path / "none", tmp_path / "other")
    assert not (tmp_path / "other").exists()
