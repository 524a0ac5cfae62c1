"""Signs that a run does not learn, measured during training and reported with a remedy.

They are measured in the step, at the cost of a product of d x d: for a tower's embeddings X (b, d),
with rows of unit norm,

    mean cosine of two of them    (|sum of X|^2 - b) / (b (b - 1))
    effective rank                tr(M)^2 / tr(M M),  M = X^T X

The effective rank (the participation ratio of M's eigenvalues) is 1 if all embeddings are on one
line, and d if they fill the space evenly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.losses.options import resolve

# A sign must persist for this share of the run before it is reported, within these limits in steps.
_SHARE, _LEAST, _MOST = 0.1, 20, 200
_NEAR_CHANCE = 0.02
# A text tower that is trained from scratch passes through a mean cosine of 0.94 while it learns: a
# narrow cone is not a collapse.
_COLLAPSED_COSINE, _COLLAPSED_RANK = 0.99, 1.02


def of_embeds(embeds: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns `mean_cosine/TOWER` and `effective_rank/TOWER`, float32 scalars.

    Args:
      embeds: tower -> (b, d) rows of unit norm.
    """
    found = {}
    for tower, rows in embeds.items():
        rows = jax.lax.stop_gradient(rows).astype(jnp.float32)
        count = rows.shape[0]
        total = jnp.sum(rows, axis=0)
        pairs = max(count * (count - 1.0), 1.0)  # a float: from 46,342 rows on no int32 holds it
        moment = jnp.matmul(rows.T, rows, precision="highest")
        found[f"mean_cosine/{tower}"] = (jnp.sum(total**2) - jnp.trace(moment)) / pairs
        found[f"effective_rank/{tower}"] = jnp.trace(moment) ** 2 / jnp.sum(moment**2)
    return found


def of_gradients(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns `gradient_norm/TOWER` of each tower with trained leaves."""
    towers = sorted({path.split("/")[1] for path in gradients if path.startswith("towers/")})
    return {
        f"gradient_norm/{tower}": optax.tree.norm(
            {p: g for p, g in gradients.items() if p.startswith(f"towers/{tower}/")}
        )
        for tower in towers
    }


def of_scale(params: Mapping[str, jax.Array], maximum: float) -> dict[str, jax.Array]:
    """Returns `logit_scale`, and 1 or 0 for whether it is at its clamp, if it trains.

    Args:
      maximum: maximum of the inverse temperature; 0 for no clamp.
    """
    if "logit_scale" not in params:
        return {}
    scale = params["logit_scale"]
    if not maximum:
        return {"logit_scale": scale}
    at_clamp = (scale >= math.log(maximum) - 1e-5).astype(jnp.float32)
    return {"logit_scale": scale, "logit_scale_at_clamp": at_clamp}


@dataclasses.dataclass
class _Sign:
    """A condition that should not persist.

    Attributes:
      holds: returns whether the condition holds, given the logged values.
      told: returns the message, given the step since which it holds, and the values.
      since: first step of the current period in which it holds; None if it does not.
      is_told: whether this period was reported.
    """

    holds: Callable[[Mapping[str, float]], bool]
    told: Callable[[int, Mapping[str, float]], str]
    since: int | None = None
    is_told: bool = False


class Health:
    """Watches the logged metrics of a run for problems that the user should know."""

    def __init__(self, config: ExperimentConfig, trained: Mapping[str, bool]):
        """Starts to watch.

        Args:
          trained: tower -> whether any of its leaves train.
        """
        self._warmup = config.optimizer.warmup_steps
        self._window = min(_MOST, max(_LEAST, round(_SHARE * config.total_steps)))
        self._signs = [_at_chance(config), _at_clamp(config)]
        self._signs += [_collapsed(tower, trains) for tower, trains in trained.items()]

    def look(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns what to report at a step: each sign once, and again only after it went away."""
        found = []
        for sign in self._signs:
            if step <= self._warmup or not sign.holds(values):
                sign.since, sign.is_told = None, False
                continue
            sign.since = step if sign.since is None else sign.since
            if step - sign.since >= self._window and not sign.is_told:
                sign.is_told = True
                found.append(sign.told(sign.since, values))
        return found


def _at_chance(config: ExperimentConfig) -> _Sign:
    chance = math.log(config.global_batch_size)
    frame = resolve(config.loss)

    def directions(values: Mapping[str, float]) -> list[tuple[float, float]]:
        """Returns the loss of each direction, and the minimum that its targets allow."""
        floor = values.get("target_entropy", 0.0)
        found = []
        for name in ("u_to_v", "v_to_u"):
            weighted = frame.weighted in (name, "both", "own")
            if f"loss_{name}" in values:
                found.append((values[f"loss_{name}"], floor if weighted else 0.0))
        return found

    def holds(values: Mapping[str, float]) -> bool:
        # Soft targets may be so uniform that a loss near log N is the minimum.
        telling = [(loss, chance - floor) for loss, floor in directions(values)]
        telling = [(loss, room) for loss, room in telling if room > 0.1 * chance]
        near = [abs(chance - loss) < _NEAR_CHANCE * room for loss, room in telling]
        return bool(near) and all(near)

    def told(since: int, values: Mapping[str, float]) -> str:
        return (
            f"the loss has been at log N = {chance:.3f}, the chance level of a batch of "
            f"{config.global_batch_size}, since step {since}: the model does not distinguish "
            "pairs. Check whether the two sides of the pairs belong together, and try another "
            "--config.optimizer.learning_rate (often a lower one) or a longer "
            "--config.optimizer.warmup_steps"
        )

    return _Sign(holds, told)


def _at_clamp(config: ExperimentConfig) -> _Sign:
    maximum = config.temperature.maximum

    def told(since: int, values: Mapping[str, float]) -> str:
        return (
            f"the inverse temperature has been at its clamp, {maximum:g}, since step {since}. As "
            "long as the held-out loss falls, this is harmless; otherwise raise "
            "--config.temperature.maximum, or let it rise more slowly "
            "(--config.optimizer.multipliers=logit_scale=0.1)"
        )

    return _Sign(lambda values: values.get("logit_scale_at_clamp", 0.0) == 1.0, told)


def _collapsed(tower: str, trains: bool) -> _Sign:
    cosine, rank = f"mean_cosine/{tower}", f"effective_rank/{tower}"

    def holds(values: Mapping[str, float]) -> bool:
        one_line = values.get(rank, math.inf) < _COLLAPSED_RANK
        return one_line or values.get(cosine, 0.0) > _COLLAPSED_COSINE

    def told(since: int, values: Mapping[str, float]) -> str:
        remedy = (
            "Go back to an earlier step, with a lower --config.optimizer.learning_rate, a longer "
            "--config.optimizer.warmup_steps or a smaller --config.optimizer.clip_norm"
            if trains
            else f"It does not train: check its weights, config.towers.{tower}.pooling and its "
            "inputs"
        )
        return (
            f"the embeddings of the {tower} tower have collapsed since step {since}: mean cosine "
            f"{values[cosine]:.3f}, effective rank {values[rank]:.2f}, so all are nearly equal. "
            f"{remedy}"
        )

    return _Sign(holds, told)
