"""Writes a source's embeddings: `python -m cwcl_jax.embed --config=FILE --output=DIR`.

By default these are the locked tower's features of the training data; a run whose source line has
`features_from=DIR` then trains from them without running that tower. With `--workdir` the tower is
that of a trained run (`--step=best --weights=ema`: of another step, or its averages), and
`--what=embeds` writes the normalised embeddings after its head, for search and plots. An
interrupted command continues where it stopped. A folder of files is also a source
(`--source=folder:DIR`, pictures or recordings); unreadable files are counted.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.paths import is_url, to_path

if TYPE_CHECKING:
    from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
    from cwcl_jax.data.sources import Source
    from cwcl_jax.training.encode import Encoder
    from cwcl_jax.training.state import TowerSource
    from cwcl_jax.training.watchdog import Watchdog


# Share of the examples that may be unusable; None: the config's data.max_skipped_share.
_SHARES = {"limit": None, "skip": 1.0, "raise": 0.0}
_ERRORS = (
    "unusable examples have no vector: up to data.max_skipped_share of them (limit), however many "
    "there are (skip), or none at all (raise)"
)


def _define(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", default="", help="workdir of a trained run, instead of --config")
    add("--output", required=True, help="folder for the embeddings")
    add("--tower", default="", help="name of the tower; default: the locked one (U)")
    add("--modality", default="", help=SUPPRESS)  # its former name
    add("--source", default="", help="source line; default: the training data")
    what = ["features", "embeds"]
    add("--what", default="features", choices=what, help="outputs before or after the head")
    dtypes = ["float16", "bfloat16", "float32"]
    add("--dtype", default="float16", choices=dtypes, help="dtype of the stored vectors")
    add("--batch_size", type=cli.at_least(1), default=256, help="examples per call")
    add("--errors", default="limit", choices=[*_SHARES], help=_ERRORS)
    add("--step", type=cli.step, help="checkpoint of --workdir, or best; default: the latest")
    about = "of --workdir: as trained, or their moving averages"
    add("--weights", default="trained", choices=["trained", "ema"], help=about)


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
    errors: str = "limit",
    step: int | str | None = None,
    weights: str = "trained",
    watchdog: Watchdog | None = None,
) -> int:
    """Embeds a source; returns the exit code.

    Args:
      config: the experiment; with `workdir`, that run's own.
      workdir: a trained run, or "" for the weights that the config imports.
      line: source line, "" for the training data.
      errors: "limit", "skip" or "raise", as the option.
      step: of `workdir`: a number, "best", or None for the latest.
      weights: of `workdir`: "trained", or "ema" for the averages of the trained leaves.

    Raises:
      ConfigError: invalid settings, data or weights, or a folder of something else.
      TooManyBadExamples: a larger share than `data.max_skipped_share` is unusable.
    """
    from cwcl_jax.training.embedding import all_finished, embed_source, folder_description
    from cwcl_jax.training.stopping import IndependentStop
    from cwcl_jax.training.watchdog import unwatched

    tower = tower or config.tower_names[0]
    if tower not in config.towers:
        raise ConfigError(f"--tower={tower}: the towers are {sorted(config.towers)}")
    source = _source(config, line or config.data.train)
    encoder, sources = _encoder(config, workdir, step, weights)
    description = folder_description(
        encoder, sources, source, tower, output=what, dtype=dtype, shard_size=shard_size
    )
    writer = _writer(output, description)
    share, data = _SHARES[errors], config.data
    if share is not None:
        data = dataclasses.replace(data, max_skipped_share=share)
    watchdog, told = watchdog or unwatched(), Counter[str]()
    with IndependentStop() as stop, watchdog.phase("embedding"):
        finished = embed_source(
            encoder, source, writer, data,
            output=what, batch_size=batch_size, stop=lambda done: stop.requested(),
            watchdog=watchdog, told=told,
        )  # fmt: skip
        finished = all_finished(finished, stop.requested, watchdog)
    for remark, count in told.items():
        print(f"warning: {count} of the examples embedded now are {remark}")
    if not finished:
        print("stopped")
        return cli.PREEMPTED
    has = f"{description.told()} by the tower {tower!r} in {output}{writer.told_rounding()}"
    print(f"{len(source)} examples, each with {has}")
    return cli.DONE


def _source(config: ExperimentConfig, line: str) -> Source:
    from cwcl_jax.data.sources import open_source

    try:
        return open_source(line, cache_dir=config.data.cache_dir)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--source={line}: {error}") from error


def _writer(output: str, description: EmbeddingDescription) -> EmbeddingWriter:
    """Returns the writer of this process's part of the folder of embeddings."""
    import jax

    from cwcl_jax.data.embeddings import EmbeddingWriter

    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    try:
        return EmbeddingWriter(output, description, **place)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _encoder(
    config: ExperimentConfig, workdir: str, step: int | str | None, weights: str
) -> tuple[Encoder, dict[str, TowerSource]]:
    """Returns a run's encoder, or the one that the config imports, and the source of its weights.

    Each process works on its own files with its own devices: nothing is exchanged.
    """
    import jax

    from cwcl_jax.training.checks import check_inputs
    from cwcl_jax.training.encode import imported_encoder, load_encoder, tower_sources
    from cwcl_jax.training.state import with_sizes_of_files

    devices = jax.local_devices()
    if not workdir:
        if step is not None or weights != "trained":
            raise ConfigError(
                "--step and --weights belong to --workdir: an imported model has one step"
            )
        check_inputs(with_sizes_of_files(config))  # as training does, before weights are read
        return imported_encoder(config, devices=devices)
    encoder, _ = load_encoder(to_path(workdir), step, weights=weights, devices=devices)
    return encoder, tower_sources(to_path(workdir))


@cli.command(_define, config=True)
def main(options: Namespace) -> int:
    """Embeds, alone or as one process of a job."""
    from cwcl_jax.training.distributed import initialize, run_main
    from cwcl_jax.training.workdir import load_config

    if bool(options.workdir) == (options.config is not None):
        raise ConfigError("give either --config=FILE or --workdir=RUN")
    if options.modality:
        raise ConfigError(f"--modality={options.modality} is now called --tower={options.modality}")
    config = options.config or load_config(to_path(options.workdir))
    initialize(config.distributed)

    def run(watchdog: Watchdog) -> int:
        return embed(
            config,
            workdir=options.workdir,
            output=options.output,
            tower=options.tower,
            line=options.source,
            what=options.what,
            dtype=options.dtype,
            batch_size=options.batch_size,
            errors=options.errors,
            step=options.step,
            weights=options.weights,
            watchdog=watchdog,
        )

    logs = None if is_url(options.output) else Path(options.output) / "logs"
    return run_main(run, config.distributed, code_of=cli.exit_code, logs=logs)


if __name__ == "__main__":
    sys.exit(main())
