"""Trains one tower against another: `python -m cwcl_jax.train --config=configs/lit_cwcl.py`.

The same command resumes an interrupted run, and reports if it is complete. Exit codes: 0 done, 75
saved and stopped on request, 2 bad settings, 43 a deadline passed, 1 anything else.
"""

import sys
from argparse import ArgumentParser, Namespace

from cwcl_jax.early import leave_on_request

if __name__ == "__main__":
    leave_on_request()

from cwcl_jax import cli
from cwcl_jax.config import with_tasks
from cwcl_jax.paths import is_url, to_path


def _define(parser: ArgumentParser) -> None:
    about = (
        "folder of the run, also s3://BUCKET/... or gs://...; by default runs/ and the config's "
        "name and argument"
    )
    parser.add_argument("--workdir", help=about)
    about = "some of the config's tasks, separated by commas, or a JSON file of tasks"
    parser.add_argument("--tasks", default="", help=about)


@cli.command(_define, config=True)
def main(options: Namespace) -> int:
    """Trains, alone or as one process of a job."""
    config = cli.required(options.config)
    if options.tasks:
        config = with_tasks(config, options.tasks)
    workdir = to_path(options.workdir or f"runs/{config.name}")
    # Imported here, so that flags and settings are checked before the slow imports.
    from cwcl_jax.training.distributed import initialize, run_main
    from cwcl_jax.training.run import train
    from cwcl_jax.training.workdir import check_place, made_folder

    check_place(workdir, config)
    # before the processes meet, so that each can report a problem with the folder
    with made_folder(workdir):
        initialize(config.distributed)
        return run_main(
            lambda watchdog: train(config, workdir, watchdog),
            config.distributed,
            code_of=cli.exit_code,
            logs=None if is_url(workdir) else workdir / "logs",  # a process's output is appended
        )


if __name__ == "__main__":
    sys.exit(main())
