"""The train step: one `jax.jit` over the global batch.

    batch -> locked tower, outside the differentiated function -> features -> p, u
          -> tuned tower -> v -> loss(u, v, p, logit_scale) -> gradients of trained leaves -> optax

With accumulation the towers run over chunks of the batch, but the loss sees all of its embeddings
at once, so that the negatives are those of the whole batch (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", GradCache). The chunks are embedded
without gradient, the loss gives the gradient of each embedding, and a second pass propagates these
back through the towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cwcl_jax import compiling
from cwcl_jax.losses import make_loss
from cwcl_jax.losses.options import Frame, is_own, resolve
from cwcl_jax.training import ema, health, sharding
from cwcl_jax.training.optimizer import make_schedule
from cwcl_jax.training.state import Blueprint, Leaves, TrainState

Metrics = dict[str, jax.Array]
Batch = Mapping[str, Any]
# Inputs of the loss besides the embeddings: "labels" and "guide", or None, and "progress".
Context = Mapping[str, Any]

_NORM_EPSILON = 1e-12
_SCALARS = ("logit_scale", "logit_bias")
# Keys next to the towers' embeddings: the features of U and of V from which weights are computed.
_P, _Q = "weights_from", "v_weights_from"


class TrainStep:
    """`state, metrics = step(state, locked, batch)`, compiled once; `state` is donated.

    Attributes:
      traces: how often the step was traced; 1 after any number of steps.
    """

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self._optimizer = blueprint.optimizer()
        self._gradients = GradientFunction(blueprint)
        self.traces = 0
        config = blueprint.config
        self._schedule = make_schedule(config.optimizer, config.total_steps)
        self._jitted = jax.jit(
            self.update,
            in_shardings=(
                _shardings(blueprint.abstract_state()),
                _shardings(blueprint.abstract_locked),
                sharding.batch_sharding(blueprint.mesh),
            ),
            out_shardings=(
                _shardings(blueprint.abstract_state()),
                sharding.replicated(blueprint.mesh),
            ),
            donate_argnums=0,
            compiler_options=compiling.options(blueprint.mesh.devices.flat[0].platform),
        )

    def __call__(
        self, state: TrainState, locked: Leaves, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        return self._jitted(state, locked, batch)

    def lower(self, batch: Any) -> Any:
        """Returns the step lowered for abstract inputs, to be compiled and analysed."""
        blueprint = self._blueprint
        return self._jitted.lower(blueprint.abstract_state(), blueprint.abstract_locked, batch)

    def update(self, state: TrainState, locked: Leaves, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns state and metrics after a step; traceable, for programs of several steps."""
        self.traces += 1
        gradients, metrics, statistics = self._gradients(
            state.params, {**locked, **state.statistics}, batch, state.step
        )
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        params = self._clamp(optax.apply_updates(state.params, updates))
        metrics |= {
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(self._schedule(state.step), jnp.float32),
            **health.of_gradients(gradients),
            **health.of_scale(params, self._blueprint.config.temperature.maximum),
        }
        statistics = {path: statistics[path] for path in state.statistics}
        averages = ema.updated(self._blueprint.config.optimizer, state.ema, params, state.step)
        return TrainState(state.step + 1, params, opt_state, statistics, averages), metrics

    def _clamp(self, params: Any) -> Leaves:
        maximum = self._blueprint.config.temperature.maximum
        if not maximum or "logit_scale" not in params:
            return params
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], math.log(maximum))}


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


class GradientFunction:
    """Gradients of the trained leaves and the loss's diagnostics for one global batch."""

    def __init__(self, blueprint: Blueprint):
        config = blueprint.config
        self._blueprint = blueprint
        self._u, self._v = config.tower_names
        self._loss = make_loss(config.loss, mesh=blueprint.mesh, axes=sharding.BATCH_AXES)
        self._locked_encoders = [
            tower for tower in config.towers if blueprint.features_are_locked(tower)
        ]
        # Towers and features through which the gradient of the loss is propagated.
        self._tuned = [
            tower
            for tower in config.towers
            if any(path.startswith(f"towers/{tower}/") for path in blueprint.trained)
        ]
        self._frame: Frame = resolve(config.loss)
        self._guided = bool(config.data.guide)
        # Features of V are passed on only if the loss may read them.
        self._with_q = self._frame.needs_q or is_own(config.loss.name)
        given = {} if self._guided else {_P: self._u}
        given |= {_Q: self._v} if self._with_q else {}
        # Weights come from the locked encoder; with LoRA, from the encoder without its additions.
        self._unadapted = {x: m for x, m in given.items() if blueprint.is_only_adapted(m)}
        if not self._frame.detach_weights:
            fixed = {*self._locked_encoders, *self._unadapted.values()}
            self._tuned += [x for x, m in given.items() if m not in fixed]
        self._key = jax.random.key(config.seed)

    def __call__(
        self, params: Leaves, locked: Leaves, batch: Batch, step: jax.Array
    ) -> tuple[Leaves, Metrics, Leaves]:
        """Returns gradients (flat dict like `params`), metrics, and new running statistics.

        Args:
          locked: all other leaves, including running statistics.
          batch: by tower, arrays of shape (b, ...); "label", (b,) or (b, k), and "guide",
            (b, ...), if the loss needs them; other entries are ignored.
          step: number of steps done; folded into dropout's key, and determines the progress.
        """
        inputs = {tower: batch[tower] for tower in (self._u, self._v)}
        key = jax.random.fold_in(self._key, step)
        chunks = self._blueprint.config.accumulation_steps
        progress = step / self._blueprint.config.total_steps
        context = self._context(batch, progress)
        if chunks == 1:
            return self._direct(params, locked, inputs, context, key)
        return self._cached(params, locked, inputs, context, key, chunks)

    def _context(self, batch: Batch, progress: jax.Array) -> Context:
        guide = batch["guide"] if self._guided else None
        return {"labels": batch.get("label"), "guide": guide, "progress": progress}

    def _direct(
        self, params: Leaves, locked: Leaves, inputs: Batch, context: Context, key: jax.Array
    ) -> tuple[Leaves, Metrics, Leaves]:
        features = self._locked_features(params, locked, inputs)

        def objective(params: Leaves) -> tuple[jax.Array, tuple[Metrics, Leaves]]:
            embeds, statistics = self._embed(params, locked, inputs, features, key)
            loss, metrics = self._loss_of({**locked, **params}, embeds, context)
            return loss, (metrics, statistics)

        gradients, (metrics, statistics) = jax.grad(objective, has_aux=True)(params)
        return gradients, metrics, statistics

    def _cached(
        self,
        params: Leaves,
        locked: Leaves,
        inputs: Batch,
        context: Context,
        key: jax.Array,
        chunks: int,
    ) -> tuple[Leaves, Metrics, Leaves]:
        mesh = self._blueprint.mesh
        keys = jax.random.split(key, chunks)
        chunked = split_chunks(mesh, inputs, chunks)

        def embed_chunk(_, chunk: Any) -> tuple[None, Any]:
            inputs, key = chunk
            features = self._locked_features(params, locked, inputs)
            return None, (features, self._embed(params, locked, inputs, features, key))

        _, (features, (embeds, statistics)) = jax.lax.scan(embed_chunk, None, (chunked, keys))
        embeds = join_chunks(mesh, embeds)
        # A running average is linear in its inputs: the chunks' mean is the update of the whole
        # batch.
        statistics = {path: jnp.mean(leaf, axis=0) for path, leaf in statistics.items()}

        scalars = {name: params[name] for name in _SCALARS if name in params}
        tuned = {name: embeds[name] for name in self._tuned}

        def objective(scalars: Leaves, tuned: Leaves) -> tuple[jax.Array, Metrics]:
            return self._loss_of({**locked, **params, **scalars}, {**embeds, **tuned}, context)

        (from_scalars, from_embeds), metrics = jax.grad(objective, argnums=(0, 1), has_aux=True)(
            scalars, tuned
        )

        def pull_back(total: Leaves, chunk: Any) -> tuple[Leaves, None]:
            inputs, features, key, cotangents = chunk

            def tuned_embeds(params: Leaves) -> Leaves:
                embeds, _ = self._embed(params, locked, inputs, features, key)
                return {name: embeds[name] for name in self._tuned}

            _, vjp = jax.vjp(tuned_embeds, params)
            (gradients,) = vjp(cotangents)
            return jax.tree.map(jnp.add, total, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        cotangents = split_chunks(mesh, from_embeds, chunks)
        gradients, _ = jax.lax.scan(pull_back, zeros, (chunked, features, keys, cotangents))
        return {**gradients, **from_scalars}, metrics, statistics

    def held_out(
        self, leaves: Leaves, batch: Batch, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """Returns embeddings by tower, and the loss with its diagnostics, of a held-out batch.

        Args:
          leaves: all leaves of the model.
          batch: as for `__call__`, of the same size.
          step: the step at which the loss's schedule is evaluated.
        """
        mesh, chunks = self._blueprint.mesh, self._blueprint.config.accumulation_steps
        inputs = {tower: batch[tower] for tower in (self._u, self._v)}

        def embed(inputs: Batch) -> dict[str, jax.Array]:
            model = self._blueprint.model_def.merge(sharding.whole(mesh, leaves))
            locked = self._locked_features({}, leaves, inputs)
            features = {x: locked[x] for x in self._locked_encoders}
            for tower in [x for x in inputs if x not in features]:
                features[tower] = model.towers[tower].features(inputs[tower])
            return self._projected(model, features, locked)

        if chunks == 1:
            embeds = embed(inputs)
        else:
            embeds = join_chunks(mesh, jax.lax.map(embed, split_chunks(mesh, inputs, chunks)))
        progress = step / self._blueprint.config.total_steps
        context = self._context(batch, progress)
        loss, metrics = self._loss_of(leaves, embeds, context)
        return embeds, {"loss": loss} | metrics

    def _locked_features(
        self, params: Leaves, locked: Leaves, inputs: Batch
    ) -> dict[str, jax.Array]:
        """Returns features of the encoders that do not train: deterministic, without gradient.

        For encoders with LoRA these are the features without it, if weights are computed from them.
        """
        if not self._locked_encoders and not self._unadapted:
            return {}
        leaves = sharding.whole(self._blueprint.mesh, {**params, **locked})
        definition = self._blueprint.model_def.plain
        model = definition.merge({path: leaves[path] for path in definition.paths})
        wanted = {tower: tower for tower in self._locked_encoders} | self._unadapted
        return {
            name: jax.lax.stop_gradient(model.towers[tower].features(inputs[tower]))
            for name, tower in wanted.items()
        }

    def _embed(
        self,
        params: Leaves,
        locked: Leaves,
        inputs: Batch,
        locked_features: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], Leaves]:
        """Returns embeddings with features for the weights, and new running statistics."""
        leaves = sharding.whole(self._blueprint.mesh, {**params, **locked})
        definition = self._blueprint.model_def
        model = definition.merge(leaves, key)
        features = {x: locked_features[x] for x in self._locked_encoders}
        for number, tower in enumerate((self._u, self._v)):
            if tower not in features:
                rngs = nnx.Rngs(dropout=jax.random.fold_in(key, number))
                features[tower] = model.towers[tower].features(inputs[tower], rngs=rngs)
        embeds = self._projected(model, features, locked_features)
        return embeds, jax.lax.stop_gradient(definition.statistics_of(model))

    def _projected(
        self,
        model: Any,
        features: Mapping[str, jax.Array],
        locked_features: Mapping[str, jax.Array],
    ) -> dict[str, jax.Array]:
        embeds = {tower: model.towers[tower].project(features[tower]) for tower in features}
        if not self._guided:
            embeds[_P] = self._for_weights(locked_features.get(_P, features[self._u]))
        if self._with_q:
            embeds[_Q] = self._for_weights(locked_features.get(_Q, features[self._v]))
        return embeds

    def _for_weights(self, features: jax.Array) -> jax.Array:
        """Returns features from which the loss computes weights: normalised, unless it uses norms.

        The loss itself normalises profiles of several channels.
        """
        if not self._frame.raw_features and features.ndim == 2:
            features = normalise(features)
        return jax.lax.stop_gradient(features) if self._frame.detach_weights else features

    def _loss_of(
        self, leaves: Leaves, embeds: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, Metrics]:
        guide = context["guide"]
        loss, metrics = self._loss(
            embeds[self._u],
            embeds[self._v],
            embeds[_P] if guide is None else self._for_weights(guide),
            leaves["logit_scale"],
            logit_bias=leaves.get("logit_bias"),
            q=embeds.get(_Q),
            labels=context["labels"],
            progress=context["progress"],
        )
        if self._frame.config.diagnostics:
            metrics = metrics | health.of_embeds({x: embeds[x] for x in (self._u, self._v)})
        return loss, metrics


def normalise(features: jax.Array) -> jax.Array:
    """Returns rows of unit norm, in float32."""
    features = features.astype(jnp.float32)
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(squares, _NORM_EPSILON**2))


def split_chunks(mesh: jax.sharding.Mesh, tree: Any, chunks: int) -> Any:
    """Returns (b, ...) as (chunks, b / chunks, ...); each device splits its own examples."""

    def split(leaf: jax.Array) -> jax.Array:
        pieces = leaf.reshape(mesh.size, chunks, -1, *leaf.shape[1:]).swapaxes(0, 1)
        joined = pieces.reshape(chunks, -1, *leaf.shape[1:])
        return jax.lax.with_sharding_constraint(joined, sharding.chunked_batch_sharding(mesh))

    return jax.tree.map(split, tree)


def join_chunks(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Returns the inverse of `split_chunks`."""

    def join(leaf: jax.Array) -> jax.Array:
        pieces = leaf.reshape(leaf.shape[0], mesh.size, -1, *leaf.shape[2:]).swapaxes(0, 1)
        joined = pieces.reshape(-1, *leaf.shape[2:])
        return jax.lax.with_sharding_constraint(joined, sharding.batch_sharding(mesh))

    return jax.tree.map(join, tree)
