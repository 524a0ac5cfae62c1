"""Settings of a training run other than those of the data, the towers and the loss."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """The learned logit scale; `inverse_temperature = exp(logit_scale)`.

    Attributes:
      initial: inverse temperature at the start; CLIP's 1/0.07.
      maximum: clamp after each step; CLIP's 100. 0 disables the clamp.
      trained: whether it is trained.
      bias: initial logit bias, used only by the sigmoid loss (SigLIP's -10).
      from_weights: if both towers' weights are one file that holds a logit scale (and a bias), such
          as CLIP's and SigLIP's, use these instead of `initial` and `bias`.
    """

    initial: float = 1 / 0.07
    maximum: float = 100.0
    trained: bool = True
    bias: float = -10.0
    from_weights: bool = True

    def __post_init__(self):
        if self.initial <= 0:
            raise ValueError(f"initial={self.initial} must be positive: it is 1/tau")
        if self.maximum and self.initial > self.maximum:
            raise ValueError(f"initial={self.initial} exceeds maximum={self.maximum}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, its schedule and what it applies to.

    Attributes:
      name: "adamw"; or "muon" (Jordan 2024), which orthogonalises the updates of the kernels inside
          blocks and leaves everything else to AdamW: faster from scratch, less tested for
          fine-tuning.
      learning_rate: peak.
      schedule: "cosine", "constant" or "rsqrt", each after a linear warm-up.
      warmup_steps: steps of the warm-up.
      final_fraction: learning rate at the end of "cosine", as a fraction of the peak.
      rsqrt_timescale: steps over which "rsqrt" stays close to the peak.
      muon_momentum: momentum of "muon".
      weight_decay: decoupled, applied as `learning_rate * weight_decay * parameter`.
      decay: regular expression of the leaves that decay (full match on the path). By default these
          are kernels and the embeddings of tokens, types and positions, in every tower; no biases,
          norms or scalars, nor the class token. This corresponds to OpenCLIP, whose rule is two
          dimensions or more.
      clip_norm: global gradient norm; 0 disables clipping.
      multipliers: "regex=factor" entries for the learning rate; the first match counts.
      layer_decay: factor per layer below the top of a tuned tower, 1.0 for none.
      ema_decay: decay of a moving average of the trained leaves (see `training.ema`), kept in
          addition to them; 0 keeps none. 0.999 averages over about 1,000 steps.
      ema_warm_start: begin with a smaller decay that grows to `ema_decay`.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    rsqrt_timescale: int = 10_000
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 1e-4
    decay: str = r".*/(kernel|\w*embedding)"
    clip_norm: float = 1.0
    multipliers: tuple[str, ...] = ()
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    ema_warm_start: bool = True

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"name={self.name!r} is not one of 'adamw', 'muon'")
        if self.schedule not in ("cosine", "constant", "rsqrt"):
            raise ValueError(
                f"schedule={self.schedule!r} is not one of 'cosine', 'constant', 'rsqrt'"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1]")
        for name in ("b1", "b2", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        _at_least(0, self, "learning_rate", "warmup_steps", "final_fraction", "eps", "weight_decay")
        _at_least(0, self, "clip_norm", meaning="0 disables clipping")
        _at_least(1, self, "rsqrt_timescale")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are saved and kept, and when a run ends early.

    Attributes:
      every_steps: interval of saves; 0 saves only at the end and when the run is interrupted.
      keep: how many of the latest are kept; 0 keeps all.
      keep_every: steps that are multiples of this are also saved and never deleted; 0 for none.
      best: "NUMBER:min" or "NUMBER:max" keeps the step with the best value of a logged number, such
          as "validation/loss:min", in addition to the latest ones; "" for none.
      patience: ends the run after this many values of that number that are not better; 0 never
          does.
      asynchronous: whether the loop continues while files are written.
      accept_changes: resume although settings, tower weights, data or code differ from the saved
          ones; what is accepted is printed. It applies only to this start and is not stored with
          the run.
    """

    every_steps: int = 500
    keep: int = 2
    keep_every: int = 0
    best: str = ""
    patience: int = 0
    asynchronous: bool = True
    accept_changes: bool = False

    def __post_init__(self):
        _at_least(0, self, "every_steps", meaning="0 saves at the end only")
        _at_least(0, self, "keep", meaning="0 keeps all")
        _at_least(0, self, "keep_every", meaning="0 keeps none permanently")
        _at_least(0, self, "patience", meaning="0 never ends a run early")
        if self.best and not re.fullmatch(r".+:(min|max)", self.best):
            raise ValueError(
                f"best={self.best!r} is not NUMBER:min or NUMBER:max, for example "
                "validation/loss:min"
            )
        if self.patience and not self.best:
            raise ValueError(
                f"patience={self.patience} needs best, for example best=validation/loss:min"
            )


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Which metrics are written, and where.

    Attributes:
      every_steps: interval of lines in metrics.jsonl and TensorBoard. Where the output is no
        terminal, at most one of them in five seconds is printed too.
      tensorboard: whether to write TensorBoard files.
      wandb_project: name of a Weights & Biases project; "" for none (extra: wandb).
    """

    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str = ""

    def __post_init__(self):
        _at_least(1, self, "every_steps")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How arrays are split over the devices.

    Attributes:
      fsdp: devices over which parameters and optimizer state are split; the rest form the axis
          `data`. The batch is split over both.
    """

    fsdp: int = 1

    def __post_init__(self):
        _at_least(1, self, "fsdp")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other and how long they wait.

    Attributes:
      coordinator_address: "host:port" of process 0; only with num_processes.
      num_processes: 0 reads the layout from the environment.
      process_id: number of this process; only with num_processes.
      initialization_timeout: seconds to wait for all processes at the start.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.
      barrier_timeout: seconds to wait for the other processes before checks and saves.
      startup_timeout: the watchdog's limit, in seconds, for everything before the first step; like
          the limits below it counts time without progress, and 0 disables it.
      first_step_timeout: for compiling and doing the first step of a start.
      step_timeout: for each further step, including the wait for its data.
      evaluation_timeout: for each batch of an evaluation, or the work between two.
      saving_timeout: for a checkpoint.
      embedding_timeout: for each batch of an embedding.
      shutdown_timeout: for all processes to end together.
    """

    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = 0
    initialization_timeout: int = 300
    heartbeat_timeout: int = 30
    barrier_timeout: float = 600.0
    startup_timeout: float = 1800.0
    first_step_timeout: float = 1800.0
    step_timeout: float = 600.0
    evaluation_timeout: float = 1800.0
    saving_timeout: float = 1800.0
    embedding_timeout: float = 1800.0
    shutdown_timeout: float = 300.0

    def __post_init__(self):
        names = [field.name for field in dataclasses.fields(self)]
        limits = [name for name in names if name.endswith("_timeout")]
        _at_least(0, self, *limits, meaning="0 means no limit")
        _at_least(0, self, "num_processes", meaning="0 reads the layout from the environment")


def _at_least(minimum: int, config: Any, *names: str, meaning: str = "") -> None:
    """Raises ValueError if a field is smaller, or not a finite number."""
    for name in names:
        value = getattr(config, name)
        if not minimum <= value < math.inf:
            rule = f"must be at least {minimum}" if minimum else "must not be negative"
            raise ValueError(f"{name}={value} {rule}{f'; {meaning}' if meaning else ''}")
