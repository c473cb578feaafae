"""Several devices: as on one, whichever and however many; several processes: as one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, tiny_config

from spak_jax.command_line import InputError
from spak_jax.config import first_difference


def outcome_of(made_once, name: str, *parts: str):
    """What `eight_devices` tells of some of its parts, once."""

    def tell(folder):
        flags = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"
        result = subprocess.run(
            [sys.executable, ROOT / "tests" / "eight_devices.py", folder, *parts],
            capture_output=True,
            text=True,
            env=os.environ | {"XLA_FLAGS": " ".join(flags).strip()},
        )
        assert result.returncode == 0, result.stderr

    return json.loads((made_once(name, tell) / "found.json").read_text())


@pytest.fixture(scope="module")
def found(made_once):
    return outcome_of(
        made_once, "devices", "gone_on_with", "shares", "random_places", "kernels", "too_many"
    )


@pytest.fixture(scope="module")
def found_of_more_programs(made_once):
    return outcome_of(made_once, "more-devices", "seeds", "gradients_at_once")


def test_losses_are_those_of_one_device_and_runs_go_on_with_others(found):
    trained = found["gone_on_with"]
    assert len(trained["one"]) == 4
    # Gradients are sums in another order; a mean over other rows, or other dropout, is 1e-3 away.
    np.testing.assert_allclose(trained["several"], trained["one"], rtol=1e-6)
    assert trained["largest_difference"] < 1e-6


@pytest.mark.slow
def test_seeds_on_devices_of_their_own_exchange_nothing(found, found_of_more_programs):
    seeds = found_of_more_programs["seeds"]
    first, second = seeds["seeds"]
    np.testing.assert_allclose(first, found["gone_on_with"]["one"], rtol=1e-5)
    assert second != first and seeds["devices_of_a_result"] == 1
    program = seeds["program"]
    # But for the losses, once a call; the axis of the rows has one device a seed.
    assert program.count(" all-gather(") <= 2
    assert "all-to-all" not in program and "reduce-scatter" not in program


def test_each_device_keeps_a_share_of_the_matrices(found):
    assert set(found["shares"]["shares"]) == {0.5}


def test_what_rows_draw_does_not_depend_on_devices(found):
    assert found["random_places"] == {"gaps": True, "offsets": True}


def test_kernels_drop_and_sum_over_devices_as_on_one(found):
    assert max(found["kernels"]["differences"]) < 1e-5


@pytest.mark.slow
def test_gradients_made_at_once_are_those_of_one_device(found_of_more_programs):
    assert max(found_of_more_programs["gradients_at_once"]["differences"]) < 1e-5


def test_too_few_devices_are_an_error(found):
    assert "parallel.data = 16" in found["too_many"]["refused"]
    assert "there are 8" in found["too_many"]["refused"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"parallel": {"data": 3}}, "parallel.data = 3 must divide train.batch = 8"),
        ({"parallel": {"seeds": 2}}, "parallel.seeds = 2 must divide train.seeds = 1"),
        ({"parallel": {"shard_weights": True}}, "needs parallel.data of at least 2"),
        ({"parallel": {"data": 0}}, "parallel.data = 0"),
    ],
)
def test_devices_must_share_evenly(sections, said):
    with pytest.raises(InputError, match=said):
        tiny_config(**sections)


def test_devices_do_not_make_another_run():
    several = tiny_config(parallel={"data": 2})
    assert several.parallel.data == 2 and "parallel" not in several.model_dump()
    assert first_difference(several, tiny_config()) is None
