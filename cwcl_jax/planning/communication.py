"""Bytes that one device sends in a step, reckoned from shapes: gradients, parameters, the loss."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from cwcl_jax.planning.work import Work
from cwcl_jax.training.state import Blueprint


def sent_bytes(blueprint: Blueprint, work: Work, *, is_gpu: bool) -> dict[str, float]:
    """By purpose; conventions of `cwcl_jax.training.collectives`.

    Gradients are summed over all devices once: XLA for GPUs and TPUs moves the sum out of the loop
    over an accumulated batch's chunks, unless leaves are split (XLA for CPUs never does). XLA for
    GPUs sums those of matrices in the type in which they were computed. Split leaves are gathered
    for each forward and backward pass.
    """
    devices = blueprint.mesh.size
    chunks = blueprint.config.accumulation_steps
    share = (devices - 1) / devices
    narrow = jnp.dtype(blueprint.config.dtype).itemsize / 4 if is_gpu or chunks == 1 else 1
    gradients = sum(
        _bytes(leaf) * (narrow if len(leaf.shape) > 1 else 1)
        for leaf in blueprint.abstract_params.values()
    )
    passes = chunks * (3 if chunks > 1 else 2)
    gathered = sum(_gathered(leaf) for leaf in blueprint.abstract_params.values()) * passes
    gathered += sum(_gathered(leaf) for leaf in blueprint.abstract_locked.values()) * chunks
    sent = {
        "gradients": 2 * share * gradients * (chunks if blueprint.mesh.shape["fsdp"] > 1 else 1),
        "parameters": gathered,
        "loss": float(sum(work.sent.values())),
    }
    return {purpose: value for purpose, value in sent.items() if value}


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _gathered(leaf: Any) -> float:
    """What one device sends so that all have the whole leaf; 0 if they have it anyway."""
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    parts = math.prod(leaf.shape) // max(shard, 1)
    return _bytes(leaf) * (parts - 1) / parts
