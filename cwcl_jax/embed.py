"""Writes a source's embeddings: `python -m cwcl_jax.embed --config=FILE --output=DIR`.

By default the locked tower's features of the training data; a run whose source line says
`features_from=DIR` then trains from them without running that tower. With `--workdir` the tower is
that of a trained run, and `--what=embeds` gives the normalised embeddings after its head, for
search and plots. An interrupted command continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig

if TYPE_CHECKING:
    from cwcl_jax.training.watchdog import Watchdog

if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    flags.declare_key_flag("config")  # so that --help shows it
    _WORKDIR = flags.DEFINE_string("workdir", "", "A trained run, in place of --config.")
    _OUTPUT = flags.DEFINE_string("output", "", "Folder of the embeddings.")
    _TOWER = flags.DEFINE_string("tower", "", "Tower; default: the locked one (U).")
    _FORMER = flags.DEFINE_string("modality", "", "The former name of --tower.")
    _SOURCE = flags.DEFINE_string("source", "", "Source line; default: the training data.")
    _WHAT = flags.DEFINE_enum(
        "what", "features", ["features", "embeds"], "Before or after the head"
    )
    _DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16", "float32"], "Stored as.")
    _BATCH = flags.DEFINE_integer("batch_size", 256, "Examples per call.", lower_bound=1)


def embed(
    config: ExperimentConfig,
    *,
    workdir: str,
    output: str,
    tower: str = "",
    line: str = "",
    what: str = "features",
    dtype: str = "float16",
    batch_size: int = 256,
    shard_size: int = 8192,
    watchdog: Watchdog | None = None,
) -> int:
    """Embeds a source; returns the exit code.

    Args:
      config: the experiment; with `workdir` that run's own.
      workdir: "" for the weights that the config imports.
      line: source line, "" for the training data.

    Raises:
      ConfigError: settings, data or weights that cannot work, or a folder of something else.
    """
    import jax

    from cwcl_jax.data.embeddings import EmbeddingWriter
    from cwcl_jax.data.sources import open_source
    from cwcl_jax.training.embedding import all_finished, embed_source, folder_description
    from cwcl_jax.training.encode import imported_encoder, load_encoder, tower_sources
    from cwcl_jax.training.stopping import IndependentStop
    from cwcl_jax.training.watchdog import unwatched

    tower = tower or config.tower_names[0]
    if tower not in config.towers:
        raise ConfigError(f"--tower={tower}: the towers are {sorted(config.towers)}")
    try:
        source = open_source(line or config.data.train, cache_dir=config.data.cache_dir)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--source={line or config.data.train}: {error}") from error
    # Each process works through files of its own with its own devices: nothing is exchanged.
    devices = jax.local_devices()
    if workdir:
        encoder, _ = load_encoder(Path(workdir), devices=devices)
        sources = tower_sources(Path(workdir))
    else:
        encoder, sources = imported_encoder(config, devices=devices)
    width = encoder.width(tower, what)
    description = folder_description(
        encoder, sources, source, tower, output=what, dtype=dtype, width=width,
        shard_size=shard_size,
    )  # fmt: skip
    try:
        writer = EmbeddingWriter(
            output,
            description,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    watchdog = watchdog or unwatched()
    with IndependentStop() as stop, watchdog.phase("embedding"):
        finished = embed_source(
            encoder, source, writer, config.data,
            output=what, batch_size=batch_size, progress=_report,
            stop=lambda done: stop.requested(), watchdog=watchdog,
        )  # fmt: skip
        finished = all_finished(finished, stop.requested, watchdog)
    print(f"{len(source)} vectors of {width} {dtype} in {output}" if finished else "stopped")
    return cli.DONE if finished else cli.PREEMPTED


def _report(done: int, total: int, seconds: float) -> None:
    end = "\n" if done == total else "\r"
    rate = done / max(seconds, 1e-9)
    if sys.stderr.isatty() or done == total:
        print(f"{done}/{total} embedded, {rate:.0f}/s", end=end, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Resolves the flags and embeds."""
    del argv
    from cwcl_jax.training.distributed import initialize, run_main
    from cwcl_jax.training.workdir import load_config

    if bool(_WORKDIR.value) == (_CONFIG.value is not None):
        raise ConfigError("give either --config=FILE or --workdir=RUN")
    if _FORMER.value:
        raise ConfigError(f"--modality={_FORMER.value} is now called --tower={_FORMER.value}")
    if not _OUTPUT.value:
        raise ConfigError("--output is missing: the folder to write to")
    config = load_config(Path(_WORKDIR.value)) if _WORKDIR.value else cli.resolve_config(_CONFIG)
    initialize(config.distributed)

    def run(watchdog: Watchdog) -> int:
        return embed(
            config,
            workdir=_WORKDIR.value,
            output=_OUTPUT.value,
            tower=_TOWER.value,
            line=_SOURCE.value,
            what=_WHAT.value,
            dtype=_DTYPE.value,
            batch_size=_BATCH.value,
            watchdog=watchdog,
        )

    logs = Path(_OUTPUT.value) / "logs"
    return run_main(run, config.distributed, code_of=cli.exit_code, logs=logs)


if __name__ == "__main__":
    cli.run(main)
