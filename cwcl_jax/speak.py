"""Writes synthesised speech: `python -m cwcl_jax.speak spoken:commands:test?task=intent FOLDER`.

It writes WAV files and a manifest, to listen to or to use elsewhere: `jsonl:FOLDER/manifest.jsonl`
reads the same examples. The folder has the format that `keep=FOLDER` writes and reads. An
interrupted command continues where it stopped.
"""

import sys
from argparse import ArgumentParser, Namespace

from cwcl_jax import cli
from cwcl_jax.config import ConfigError
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.recorded import Recorded, record
from cwcl_jax.data.sources.spoken import Spoken


def _define(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="source line of sentences to synthesise")
    parser.add_argument(
        "folder", metavar="FOLDER", type=cli.folder, help="folder for the recordings"
    )


@cli.command(_define)
def main(options: Namespace) -> None:
    """Synthesises what the folder lacks, and prints the path of its manifest."""
    try:
        source = open_source(options.source)
        source = source.source if isinstance(source, Recorded) else source
        if not isinstance(source, Spoken):
            raise ConfigError(
                "only spoken: sources can be written: put spoken: before the source line"
            )
        record(source, options.folder)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    print(options.folder / "manifest.jsonl")


if __name__ == "__main__":
    sys.exit(main())
