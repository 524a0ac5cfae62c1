"""Reproduces the paper's tables and figures: `python -m cwcl_jax.reproduce --table=4 --figure=5,6`.

With `--scale=embedded`, the necessary runs are made on this machine with synthetic data (scenes;
synthesised commands, which need the extra `speech`), several seeds each, resumed after a kill,
reused if complete. `--output` gets one Markdown page with our numbers and intervals over seeds, the
paper's numbers, the pictures, the commands, versions and time; and `results.json`, every metric of
every run. `--scale=paper` prints the commands of the full-scale runs for a cluster.

Tables 4 to 8, Figures 5 to 8, `--ablation=weights,speech_weights,batch`.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from cwcl_jax import cli
from cwcl_jax.config import ConfigError


def _define(parser: ArgumentParser) -> None:
    add = parser.add_argument
    several = {"action": "extend", "default": []}
    add("--table", type=cli.counts, **several, help="numbers of tables, 4 to 8")
    add("--figure", type=cli.counts, **several, help="numbers of figures, 5 to 8")
    add("--ablation", type=cli.words, **several, help="weights, speech_weights, batch")
    add("--scale", choices=["embedded", "paper"], default="embedded", help="which runs")
    add("--seeds", type=cli.at_least(1), default=3, help="number of seeds (0, 1, ...) per run")
    add("--steps", type=cli.at_least(0), default=0, help="steps per run; 0: the config's")
    add("--output", type=cli.folder, default="runs/reproduction", help="folder for the page")
    add("--runs", type=cli.folder, default="runs/reproduce", help="folder for the runs")
    add("--scenes", default="", help="additions to the argument of configs/lit_cwcl.py")
    add("--speech", default="", help="additions to the argument of configs/speech_cwcl.py")


def reproduce(
    tables: Sequence[int],
    figures: Sequence[int],
    ablations: Sequence[str],
    *,
    seeds: int,
    scale,
    output: Path,
    runs: Path,
    made_by: str,
) -> Path:
    """Makes the runs and the page; returns the page's path.

    Raises:
      ConfigError: an unknown table or figure, or invalid settings.
    """
    from cwcl_jax.reproduction import experiments, page
    from cwcl_jax.reproduction.measures import recorded
    from cwcl_jax.reproduction.runs import RunMaker
    from cwcl_jax.reproduction.sections import Maker

    unknown = [number for number in figures if number not in (5, 6, 7, 8)]
    if unknown:
        raise ConfigError(f"--figure={unknown[0]}: choose one of 5, 6, 7, 8")
    wanted = [experiments.table(number, scale) for number in tables]
    wanted += [experiments.ablation(kind, scale) for kind in ablations]
    experiments.check(experiments.needs(wanted, figures, scale), scale)
    for option, folder in (("output", output), ("runs", runs)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--{option}={folder} cannot be made: {error.strerror}") from error
    maker = Maker(RunMaker(runs), scale, range(seeds), output)
    sections = [maker.experiment(experiment) for experiment in wanted]
    drawn = {5: maker.figure5, 6: maker.figure6}
    for number in figures:
        sections.append(drawn[number]() if number in drawn else maker.alignment_figure(number))
    runner = maker.runner
    sections.append(page.closing_section(runner.commands, made_by, runner.seconds))
    numbers = json.dumps(recorded(runner.folders), indent=1)
    (output / "results.json").write_text(numbers + "\n", encoding="utf-8")
    path = output / "README.md"
    title = "# The paper's experiments at embedded scale"
    changes = {"scenes": scale.scenes, "speech": scale.speech, "steps": scale.steps}
    given = ", ".join(f"`--{name}={value}`" for name, value in changes.items() if value)
    head = [title, f"All runs, also those called CWCL, with {given}."] if given else [title]
    path.write_text("\n\n".join([*head, *sections]) + "\n", encoding="utf-8")
    return path


def paper_commands(tables: Sequence[int], seeds: int) -> str:
    """Returns the full-scale runs of the tables, one command a line, for a cluster's launcher.

    A run that an earlier table already has becomes a comment that names its folder.
    """
    image, speech = "configs/lit_cwcl.py:paper", "configs/speech_cwcl.py:paper"
    # "" is the recipe itself: a pretrained speech encoder, a locked text tower, batches of 20.
    variants = {4: (image, [""]), 5: (speech, ["init=random", ""])}
    variants[6] = (speech, ["lock=none", "lock=speech", "", "lock=both"])
    variants[7] = (speech, ["", "batch=40", "batch=80"])
    variants[8] = (speech, ["", "text=bart"])
    lines = ["# One job each; --config files name the data and weights that they need."]
    first: dict[str, int] = {}
    for number in dict.fromkeys(tables) or sorted(variants):
        if number not in variants:
            raise ConfigError(f"--table={number}: choose one of 4, 5, 6, 7, 8")
        file, arguments = variants[number]
        lines.append(f"# Table {number}")
        for config, seed in itertools.product(_both_losses(file, arguments), range(seeds)):
            name = config.split("/")[1].replace(".py:", "-").replace(",", "-").replace("=", "-")
            workdir = f"runs/{name}-seed{seed}"
            if first.setdefault(workdir, number) != number:
                lines.append(f"# as in Table {first[workdir]}: {workdir}")
                continue
            lines.append(
                f"python -m cwcl_jax.train --config={config} --config.seed={seed} "
                f"--workdir={workdir}"
            )
    return "\n".join(lines)


def _both_losses(file: str, arguments: Sequence[str]) -> list[str]:
    return [
        ",".join(filter(None, (file, argument, loss)))
        for argument in arguments
        for loss in ("loss=contrastive", "")
    ]


# Options without meaning if commands are only printed.
_EMBEDDED_ONLY = ("figure", "ablation", "steps", "scenes", "speech", "output", "runs")


@cli.command(_define)
def main(options: Namespace) -> int:
    """Makes the page, or prints the cluster's commands."""
    from cwcl_jax.reproduction.experiments import PRETRAINING_SEED, Scale

    if options.scale == "paper":
        plain = main.parse([])
        for name in _EMBEDDED_ONLY:
            if getattr(options, name) != getattr(plain, name):
                raise ConfigError(
                    f"--scale=paper prints the commands of tables: leave --{name} out"
                )
        print(paper_commands(options.table, options.seeds))
        return cli.DONE
    if not (options.table or options.figure or options.ablation):
        raise ConfigError("nothing to do: name --table, --figure or --ablation; see --help")
    if options.seeds > PRETRAINING_SEED:
        raise ConfigError(f"--seeds={options.seeds}: at most {PRETRAINING_SEED}")
    try:
        page = reproduce(
            options.table,
            options.figure,
            options.ablation,
            seeds=options.seeds,
            scale=Scale(options.steps, options.scenes, options.speech),
            output=options.output,
            runs=options.runs,
            made_by=shlex.join(["python", "-m", "cwcl_jax.reproduce", *options.argv]),
        )
    except KeyboardInterrupt:
        print("\nstopped between two runs; the same command continues", file=sys.stderr)
        return cli.PREEMPTED
    print(f"\nwritten: {page}")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
