"""Utilisation, memory and traces of a run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.planning.chips import CHIPS, chip_of
from cwcl_jax.planning.estimate import step_work
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.training import sharding
from cwcl_jax.training.meter import Meter, Profiler, model_work
from cwcl_jax.training.state import make_blueprint
from tests.planning.wide import wide_config
from tests.training.toy import toy_config


def device(peak=None):
    return types.SimpleNamespace(memory_stats=lambda: peak and {"peak_bytes_in_use": peak})


def test_a_meter_reads_the_fullest_device_and_the_share_of_the_peak():
    meter = Meter([device(2e9), device(3e9)], CHIPS["h100"], lambda batch: 989e12 * batch)
    assert meter.read(1.0) == {"memory_gb": 3.0}
    meter.prepare(0.5)
    assert meter.read(2.0) == {"mfu": pytest.approx(0.25), "memory_gb": 3.0}


def test_a_cpu_has_neither():
    meter = Meter(jax.local_devices(), chip_of(jax.local_devices()[0].device_kind), pytest.fail)
    meter.prepare(None)
    assert meter.read(1.0) == {}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("cpu", None),
    ],
)
def test_device_kinds(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_model_flops_do_not_count_what_is_computed_twice():
    plain, twice = (
        wide_config(**changes)
        for changes in ({}, {"accumulation_steps": 2, "towers.text.remat": "full"})
    )
    found = []
    for config in (plain, twice):
        blueprint = make_blueprint(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        batch = abstract_batch(blueprint)
        counted = model_work(blueprint, batch).total_flops
        found.append((counted, step_work(blueprint, batch).total_flops))
    (one, all_of_one), (two, all_of_two) = found
    assert one == two == all_of_one
    assert all_of_two > 1.2 * two


def test_a_trace_of_some_steps(tmp_path):
    profiler = Profiler(toy_config(profile="1:2"), tmp_path)
    done = []
    for step in range(5):
        profiler.at(step, jnp.ones(()))
        done.append(list(tmp_path.rglob("*.xplane.pb")) != [])
        jnp.ones(3).sum()
    profiler.end()
    assert done == [False, False, False, True, True]
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))


def test_a_run_that_ends_early_keeps_its_trace(tmp_path):
    profiler = Profiler(dataclasses.replace(toy_config(), profile="0:9"), tmp_path)
    profiler.at(0, None)
    profiler.end()
    profiler.end()
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "3:0", "a:b", "-1:2"])
def test_a_profile_is_two_numbers(text):
    with pytest.raises(ConfigError, match=r"config\.profile=.* must be START:STEPS"):
        toy_config(profile=text)
