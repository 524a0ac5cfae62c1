"""What the table at a run's start says of devices, types and attention."""

import importlib.util

import jax

from cwcl_jax.training import sharding
from cwcl_jax.training.state import make_blueprint
from cwcl_jax.training.summary import tower_table, unused_gpu
from tests.training.toy import toy_config


def table(**changes):
    config = toy_config(**changes)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return tower_table(make_blueprint(config, mesh))


def test_the_table_names_type_precision_attention_and_device(monkeypatch):
    lines = table().splitlines()
    assert all("float32 highest  xla" in line for line in lines[2:4])
    assert "cpu devices" in lines[-1]
    asked = table(**{"towers.text.attention": "cudnn", "towers.text.precision": "high"})
    assert "float32 high     cudnn" in asked

    from cwcl_jax.models import attention

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_cudnn_refuses", lambda *_: "")
    assert "bfloat16  cudnn" in table(dtype="bfloat16")


def test_a_cuda_plugin_without_gpu_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    assert "jax_cuda13_plugin is installed, but this runs on the CPU" in unused_gpu({})
    assert not unused_gpu({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not unused_gpu({})
