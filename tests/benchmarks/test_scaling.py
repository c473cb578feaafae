"""Scaling: what is compared, and how efficiency is reckoned; `test_parallel` trains on devices."""

import pytest
from conftest import ROOT, assert_refused, run_program, tiny_config

from benchmarks import scaling
from spak_jax.config_sections import Parallel


def test_a_way_keeps_what_it_says():
    config = tiny_config(model={"dropout": 0.0})
    per_device = scaling.spread(config, "fixed batch per device", 4)
    assert (per_device.train.batch, per_device.parallel) == (32, Parallel(data=4))
    over_all = scaling.spread(config, "fixed global batch", 4)
    assert (over_all.train.batch, over_all.parallel) == (8, Parallel(data=4))
    seeds = scaling.spread(config, "a seed per device", 4)
    assert (seeds.train.seeds, seeds.train.batch, seeds.parallel) == (4, 8, Parallel(seeds=4))
    assert {per_device.model, over_all.model, seeds.model} == {config.model}


def test_efficiency_is_work_in_a_time_over_that_of_single_devices(monkeypatch):
    # By parallel.data, parallel.seeds and train.batch.
    seconds = {(1, 1, 8): 0.010, (2, 1, 16): 0.0125, (2, 1, 8): 0.008, (1, 2, 8): 0.010}

    def program(config):
        devices = config.parallel
        return lambda: seconds[devices.data, devices.seeds, config.train.batch]

    monkeypatch.setattr(scaling, "_program", program)
    measured = scaling.measure(tiny_config(), 2)
    assert measured["efficiency"] == pytest.approx(
        {"fixed batch per device": 0.8, "fixed global batch": 0.625, "a seed per device": 1.0}
    )
    assert measured["milliseconds_a_step"]["fixed batch per device"]["median"] == 12.5


def test_one_device_is_no_scaling():
    assert_refused(
        run_program("benchmarks.scaling", ROOT / "configs" / "quickstart.toml"), "needs several"
    )
