"""Checkpoints: what was saved comes back, and what is damaged does not come back as something."""

import os
import shutil

import numpy as np
import pytest
from conftest import assert_refused, run_program

from spak_jax import checkpoint
from spak_jax.command_line import InputError
from spak_jax.release import release

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
    again = checkpoint.from_named(WEIGHTS, restored.weights)
    np.testing.assert_array_equal(again["block"]["kernel"], WEIGHTS["block"]["kernel"])
    np.testing.assert_array_equal(again["scale"], WEIGHTS["scale"])


def test_what_was_saved_comes_back(run, tiny):
    restored = checkpoint.restore(run, optimizer=True)
    assert (restored.step, restored.config) == (2, tiny)
    assert_is_what_was_saved(restored)
    state = checkpoint.from_named(OPTIMIZER, restored.optimizer)
    assert state[0]["count"] == 4 and (state[1][0] == 0.5).all()
    assert checkpoint.restore(run).optimizer is None


def test_only_the_last_checkpoints_are_kept(run, tiny):
    writer = checkpoint.Run(run)
    writer.save(3, tiny, WEIGHTS, OPTIMIZER)
    writer.close()
    assert checkpoint.steps_in(run) == [2, 3]


def test_names_shapes_and_dtypes_must_fit():
    named = checkpoint.named_arrays(WEIGHTS)
    assert list(named) == ["block.kernel", "scale"]
    with pytest.raises(ValueError, match="scale"):
        checkpoint.from_named(WEIGHTS, {"block.kernel": named["block.kernel"]})
    with pytest.raises(ValueError, match=r"scale is float32\[2\], expected float32\[3\]"):
        checkpoint.from_named(WEIGHTS, named | {"scale": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="scale is float64"):
        checkpoint.from_named(WEIGHTS, named | {"scale": np.ones(3)})


def test_digest_sees_every_bit_shape_and_name():
    arrays = {"a": np.zeros((2, 3), np.float32)}
    flipped = {"a": np.array([[0, 0, 0], [0, -0.0, 0]], np.float32)}
    variants = [
        arrays,
        flipped,
        {"b": arrays["a"]},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
    ]
    assert len({checkpoint.digest(variant) for variant in variants}) == len(variants)


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
def test_damage_to_any_file_is_told_or_harmless(run, tmp_path, damage):
    newest = run / "checkpoints" / "2"
    files = sorted(p.relative_to(run) for p in newest.rglob("*") if p.is_file())
    told = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        damage(copy / file)
        try:
            assert_is_what_was_saved(checkpoint.restore(copy))
        except InputError as error:
            told += 1
            assert str(copy / "checkpoints" / "2") in str(error)
            assert "step 1" in str(error) and "\n" not in str(error)
        shutil.rmtree(copy)
    # The arrays and the description, at least, cannot be spared.
    assert told >= 2


def test_many_arrays_that_cannot_be_read_are_one_message(run):
    for path in (run / "checkpoints" / "2").rglob("d/*"):
        path.write_bytes(b"")
    # In a process of its own: what arrives late is told by threads that outlive the reading.
    result = run_program("spak_jax.evaluate", run, env=os.environ)
    assert_refused(result, "checkpoints/2 is damaged", "go back to step 1")
    assert len(result.stderr.splitlines()) == 1


def test_a_lock_is_held_by_one_and_names_nobody_afterwards(tmp_path):
    with checkpoint.locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / checkpoint.LOCK).read_text()
        with (
            pytest.raises(InputError, match=r"another process \(process \d+ on "),
            checkpoint.locked(tmp_path),
        ):
            pass
    assert (tmp_path / checkpoint.LOCK).read_text() == ""
    with checkpoint.locked(tmp_path):
        pass


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
    (run / checkpoint.RESULTS).write_text("{}")
    out = tmp_path / "out" / "released"
    assert release(run, out) == 2
    restored = checkpoint.restore(out, optimizer=True)
    assert (restored.step, restored.config, restored.optimizer) == (2, tiny, None)
    assert_is_what_was_saved(restored)
    assert (out / checkpoint.RESULTS).read_text() == "{}"
    names = {path.name for path in (out / checkpoint.CHECKPOINTS).rglob("*")}
    assert checkpoint.steps_in(out) == [2] and "optimizer" not in names
    place = str(tmp_path).encode()
    assert not any(place in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with pytest.raises(InputError, match="released exists"):
        release(run, out)
    with pytest.raises(InputError, match="no run folder"):
        release(tmp_path / "none", tmp_path / "other")
    assert not (tmp_path / "other").exists()
