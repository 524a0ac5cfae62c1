"""The state of a run: trained leaves, optimizer state and locked leaves, and how they are built.

All leaves are in flat dicts, path -> array. `Blueprint` is the static side: the structure of the
two towers, which leaves train, and the sharding of each; building one allocates no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from cwcl_jax.config import ConfigError, ExperimentConfig, each
from cwcl_jax.losses.options import needs_bias
from cwcl_jax.models.leaves import ModelDef, abstract_split, split
from cwcl_jax.models.locking import decide
from cwcl_jax.models.lora import Adapter, dense_kernels, find_adapters
from cwcl_jax.models.rngs import fresh_rngs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.models.two_towers import TwoTowers, build_two_towers
from cwcl_jax.pretrained import PlannedImport, complete, folder_of, logits_of, planned_import
from cwcl_jax.training import ema, sharding
from cwcl_jax.training.optimizer import make_optimizer
from cwcl_jax.weights.failures import WrongSettings

Leaves = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What the step changes.

    Attributes:
      step: number of steps done, int32 scalar.
      params: trained leaves, float32.
      opt_state: optax state over `params`.
      statistics: running means and variances of encoders that train (BatchNorm); often none.
      ema: moving averages of `params`, see `training.ema`; none without `optimizer.ema_decay`.
    """

    step: Any
    params: Leaves
    opt_state: Any
    statistics: Leaves = dataclasses.field(default_factory=dict)
    ema: Leaves = dataclasses.field(default_factory=dict)

    @property
    def model_leaves(self) -> Leaves:
        """All leaves of the model that are not locked."""
        return {**self.params, **self.statistics}

    @property
    def ema_leaves(self) -> Leaves:
        """The same with averages instead of `params`; running statistics are averages already."""
        return {**self.ema, **self.statistics}


@dataclasses.dataclass(frozen=True)
class TowerSource:
    """The origin of a tower.

    Attributes:
      source: path of the weights, or "initialised".
      sha256: hash of the weights' file.
      random: leaves that the weights do not hold, such as a new head.
    """

    source: str
    sha256: str
    random: tuple[str, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The static side of a run.

    Attributes:
      config: the experiment.
      mesh: devices.
      model_def: structure; `model_def.merge(leaves)` returns the TwoTowers.
      abstract: every leaf as a ShapeDtypeStruct with its sharding.
      trained: paths of the leaves that have gradients and optimizer state.
    """

    config: ExperimentConfig
    mesh: Mesh
    model_def: ModelDef
    abstract: Leaves
    trained: frozenset[str]

    @property
    def abstract_params(self) -> Leaves:
        return {path: leaf for path, leaf in self.abstract.items() if path in self.trained}

    @property
    def abstract_statistics(self) -> Leaves:
        """Running statistics that the step changes: those of encoders that train."""
        changing = tuple(
            f"towers/{tower}/encoder/"
            for tower in self.config.towers
            if not self.features_are_locked(tower)
        )
        paths = [path for path in self.model_def.statistics if path.startswith(changing)]
        return {path: self.abstract[path] for path in sorted(paths)}

    @property
    def abstract_locked(self) -> Leaves:
        changing = {*self.trained, *self.abstract_statistics}
        return {path: leaf for path, leaf in self.abstract.items() if path not in changing}

    @property
    def low_rank(self) -> frozenset[str]:
        """Paths of LoRA's leaves; all of them train."""
        return frozenset(path for x in self.model_def.adapters for path in x.paths)

    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(
            self.config.optimizer, self.config.total_steps, sorted(self.abstract_params)
        )

    def abstract_state(self) -> TrainState:
        """Returns ShapeDtypeStructs with shardings of everything that a checkpoint holds."""
        params = self.abstract_params
        opt_state = jax.eval_shape(self.optimizer().init, params)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        averaged = params if self.config.optimizer.ema_decay else {}
        state = TrainState(step, params, opt_state, self.abstract_statistics, averaged)
        return _with_shardings(self.mesh, state)

    def features_are_locked(self, tower: str) -> bool:
        """Returns whether nothing before the head of this tower trains."""
        return not self._trained_before_head(tower)

    def is_only_adapted(self, tower: str) -> bool:
        """Returns whether LoRA's leaves, and nothing else, train before the head of this tower."""
        trained = self._trained_before_head(tower)
        return bool(trained) and trained <= self.low_rank

    def _trained_before_head(self, tower: str) -> set[str]:
        tower = f"towers/{tower}/"
        return {
            path
            for path in self.trained
            if path.startswith(tower) and not path.startswith(tower + "head/")
        }


def build_model(config: ExperimentConfig, rngs: nnx.Rngs) -> TwoTowers:
    """Returns the two towers and the logit scale, freshly initialised."""
    return build_two_towers(
        config.towers,
        {tower: config.data.inputs_of(tower).arrays() for tower in config.towers},
        embed_dim=config.embed_dim,
        inverse_temperature=config.temperature.initial,
        logit_bias=config.temperature.bias if needs_bias(config.loss) else None,
        dtype=config.dtype,
        precision=config.precision,
        rngs=rngs,
    )


def make_blueprint(
    config: ExperimentConfig, mesh: Mesh, *, check_batch: bool = True, compact: bool = True
) -> Blueprint:
    """Returns the static side of a run; no array is allocated.

    Args:
      check_batch: whether the global batch must fit the mesh; training needs it.
      compact: whether locked kernels have the compute dtype, as a run needs them; False keeps the
          dtypes of their files.

    Raises:
      ConfigError: the towers cannot be built as described, the global batch does not divide over
          devices and accumulation steps, or nothing trains.
    """
    if check_batch:
        _check_batch(config, mesh)
    config = with_sizes_of_files(config)
    try:
        model_def, abstract = abstract_split(lambda: build_model(config, fresh_rngs(0)))
        fixed = model_def.statistics | model_def.constants
        free = {path: leaf for path, leaf in abstract.items() if path not in fixed}
        decisions = decide(free, config.towers)
        whole = {path for path, is_trained in decisions.items() if is_trained}
        dense = dense_kernels(model_def.merge(abstract))
        adapters = find_adapters(free, whole, config.towers, dense)
    except ValueError as error:
        raise ConfigError(f"config.towers: {error}") from error
    trained = frozenset(
        path
        for path, is_trained in decisions.items()
        if is_trained and (config.temperature.trained or path != "logit_scale")
    )
    _refuse_statistics(model_def, adapters)
    added = {path: leaf for x in adapters for path, leaf in x.shapes().items()}
    model_def = dataclasses.replace(model_def, adapters=adapters)
    trained, abstract = trained | set(added), abstract | added
    # Kernels that are replaced by LoRA's sums keep their dtype, so that a sum is rounded once.
    kept = trained | {adapter.kernel for adapter in adapters if not adapter.beside}
    if not any(path.startswith("towers/") for path in trained):
        raise ConfigError("no leaf of either tower trains; set config.towers.<modality>.tune")
    try:
        make_optimizer(config.optimizer, config.total_steps, trained)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    abstract = {
        path: _locked_storage(leaf, config, path) if compact and path not in kept else leaf
        for path, leaf in abstract.items()
    }
    return Blueprint(config, mesh, model_def, _with_shardings(mesh, abstract), trained)


def _refuse_statistics(model_def: ModelDef, adapters: Sequence[Adapter]) -> None:
    """Raises ConfigError for LoRA in an encoder with running statistics, which would change."""
    for adapter in adapters:
        encoder = "/".join(adapter.kernel.split("/")[:3]) + "/"
        moving = [path for path in sorted(model_def.statistics) if path.startswith(encoder)]
        if moving and encoder.endswith("/encoder/"):
            raise ConfigError(
                f"LoRA in {encoder[:-1]} would change its running statistics too ({moving[0]}), "
                "which belong to the locked encoder: set tune='head', or 'all' without LoRA"
            )


def with_sizes_of_files(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config with tower sizes from files, for towers with weights but no preset."""
    towers = {}
    for modality, tower in config.towers.items():
        with _weights_errors(modality, tower):
            towers[modality] = complete(tower)
    return dataclasses.replace(config, towers=towers)


@contextmanager
def _weights_errors(modality: str, tower: TowerConfig) -> Iterator[None]:
    """Converts errors about a weights file to ConfigErrors that name the option."""
    try:
        yield
    except (OSError, ValueError) as error:
        option = f"config.towers.{modality}.weights"
        raise ConfigError(f"{option}={tower.weights!r}: {error}; set --{option}=...") from error


def _check_batch(config: ExperimentConfig, mesh: Mesh) -> None:
    pieces = mesh.size * config.accumulation_steps
    if config.global_batch_size % pieces:
        raise ConfigError(
            f"config.global_batch_size={config.global_batch_size} is not divisible by "
            f"{mesh.size} devices x config.accumulation_steps={config.accumulation_steps}"
        )


def _locked_storage(leaf: Any, config: ExperimentConfig, path: str) -> Any:
    """Returns a leaf as it is stored: locked kernels in the compute dtype.

    The step computes the same numbers with half the memory.
    """
    modality = path.split("/")[1] if path.startswith("towers/") else ""
    tower = config.towers.get(modality)
    dtype = (tower.dtype if tower else "") or config.dtype
    if dtype == "bfloat16" and leaf.dtype == jnp.float32 and path.endswith("/kernel"):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    return leaf


def _with_shardings(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.leaf_sharding(mesh, leaf)
        ),
        tree,
    )


def initialise(blueprint: Blueprint) -> tuple[TrainState, Leaves, dict[str, TowerSource]]:
    """Returns trained state, locked leaves and each tower's source, at step 0.

    Weights are imported before anything is initialised, so that a bad file costs no time.
    """
    imported, sources = import_towers(blueprint)
    rest = [path for path in blueprint.abstract if path not in imported]
    leaves = imported | _initialise_leaves(blueprint, rest)
    params = {path: leaves[path] for path in blueprint.abstract_params}
    abstract = blueprint.abstract_state()
    opt_state = jax.jit(
        blueprint.optimizer().init,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state),
    )(params)
    locked = {path: leaves[path] for path in blueprint.abstract_locked}
    step = sharding.put_leaf(blueprint.mesh, np.zeros((), np.int32))
    statistics = {path: leaves[path] for path in blueprint.abstract_statistics}
    averages = ema.begun(params) if blueprint.config.optimizer.ema_decay else {}
    return TrainState(step, params, opt_state, statistics, averages), locked, sources


def import_towers(blueprint: Blueprint) -> tuple[Leaves, dict[str, TowerSource]]:
    """Returns the leaves that come from files, and the source of each tower."""

    def put(path: str, value: np.ndarray) -> jax.Array:
        return sharding.put_leaf(blueprint.mesh, value.astype(blueprint.abstract[path].dtype))

    imported: Leaves = {}
    sources = {}
    planned = _planned_imports(blueprint)
    for modality, tower in blueprint.config.towers.items():
        if modality not in planned:
            sources[modality] = TowerSource("initialised", "")
            continue
        with _weights_errors(modality, tower):
            result = planned.pop(modality).read(put)  # one open file at a time
        imported |= result.leaves
        sources[modality] = TowerSource(result.source, result.sha256, result.initialised)
        _check_filled(blueprint, modality, result.initialised)
    imported |= {path: put(path, x) for path, x in _logits_of_files(blueprint).items()}
    return imported, sources


def _planned_imports(blueprint: Blueprint) -> dict[str, PlannedImport]:
    """Returns the checked imports by tower; raises one ConfigError for all that is wrong."""
    own = {path: blueprint.abstract[path] for path in blueprint.model_def.plain.paths}

    def of_tower(name: str) -> PlannedImport:
        tower = blueprint.config.towers[name]
        try:
            with _weights_errors(name, tower):
                planned = planned_import(tower, name, own)
        except ConfigError as error:
            # Weights of another kind imply other inputs, too, which are not the cause.
            if isinstance(error.__cause__, WrongSettings):
                _check_inputs_of_files(blueprint.config, name, before=f"{error}\n")
            raise
        _check_inputs_of_files(blueprint.config, name)
        return planned

    return each(of_tower, [name for name, x in blueprint.config.towers.items() if x.weights])


def _check_inputs_of_files(config: ExperimentConfig, tower: str, *, before: str = "") -> None:
    """Raises ConfigError, with `before` in front, if the files require other inputs."""
    folder = folder_of(config.towers[tower].weights)
    try:
        config.data.inputs_of(tower).check_files(folder, f"config.data.{tower}")
    except ValueError as error:
        raise ConfigError(f"{before}{error}") from error


def _check_filled(blueprint: Blueprint, modality: str, initialised: Sequence[str]) -> None:
    """Raises ConfigError if leaves that never train are missing in the weights (random forever)."""
    left = [path for path in initialised if path not in blueprint.trained]
    if left:
        tower = f"config.towers.{modality}"
        raise ConfigError(
            f"{tower}.weights={blueprint.config.towers[modality].weights!r} holds nothing for "
            f"{', '.join(left[:3])}, which would stay random: it does not train with "
            f"tune={blueprint.config.towers[modality].tune!r}. Set {tower}.head='none' for the "
            f"encoder's own features, or {tower}.tune='head' (with LoRA 'head+lora:R') to train a "
            "head above it"
        )


def _logits_of_files(blueprint: Blueprint) -> dict[str, np.ndarray]:
    """Returns logit scale and bias of a file that both towers come from, as CLIP's has them."""
    config = blueprint.config
    names = {tower.weights for tower in config.towers.values()}
    if not config.temperature.from_weights or len(names) > 1 or "" in names:
        return {}
    return {k: x for k, x in logits_of(*names).items() if k in blueprint.abstract}


def locked_leaves(blueprint: Blueprint) -> tuple[Leaves, dict[str, TowerSource]]:
    """Returns only the locked leaves, for a run whose trained leaves come from a checkpoint."""
    imported, sources = import_towers(blueprint)
    rest = [path for path in blueprint.abstract_locked if path not in imported]
    leaves = imported | _initialise_leaves(blueprint, rest)
    return {path: leaves[path] for path in blueprint.abstract_locked}, sources


def _initialise_leaves(blueprint: Blueprint, paths: list[str]) -> Leaves:
    """Returns initial values of `paths`, each created on its devices; others are not computed."""
    if not paths:
        return {}
    config = blueprint.config
    dtypes = {path: blueprint.abstract[path].dtype for path in paths}

    def values(key: jax.Array) -> Leaves:
        _, leaves = split(build_model(config, fresh_rngs(key)))
        for adapter in blueprint.model_def.adapters:
            leaves |= adapter.initial(key)
        return {path: leaves[path].astype(dtypes[path]) for path in paths}

    shardings = {path: blueprint.abstract[path].sharding for path in paths}
    return jax.jit(values, out_shardings=shardings)(jax.random.key(config.seed))


def count(leaves: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the number of parameters and of bytes."""
    sizes = [(int(np.prod(leaf.shape)), leaf.dtype.itemsize) for leaf in leaves.values()]
    return sum(n for n, _ in sizes), sum(n * itemsize for n, itemsize in sizes)
