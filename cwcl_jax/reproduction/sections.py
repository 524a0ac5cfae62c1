"""Sections of the page: run what is needed, read the numbers, draw the pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.config import ConfigError
from cwcl_jax.evaluation.compare import draw_matrices, load_items
from cwcl_jax.reproduction import experiments, figures, page
from cwcl_jax.reproduction.experiments import Experiment, Scale
from cwcl_jax.reproduction.measures import Spread, difference, spread
from cwcl_jax.reproduction.processes import run_process
from cwcl_jax.reproduction.runs import Run, RunMaker

_TEMPLATES = (1, 5, 10)


@dataclasses.dataclass
class Maker:
    """Makes sections.

    Attributes:
      runner: carries out runs.
      scale: changes of the configs.
      seeds: seeds of every run.
      folder: folder of the page and its pictures.
    """

    runner: RunMaker
    scale: Scale
    seeds: Sequence[int]
    folder: Path

    def folders(self, run: Run) -> list[Path]:
        """Returns the complete folders of a run, one per seed."""
        return [self._complete(run, seed) for seed in self.seeds]

    def experiment(self, experiment: Experiment) -> str:
        """Returns the section of a table."""
        # seed by seed, so that an interrupted command leaves complete comparisons
        for seed in self.seeds:
            for run in experiment.runs:
                self._complete(run, seed)
        numbers = {
            name: [spread(self.folders(cell.run), cell.task, cell.metric) for cell in row]
            for name, row in experiment.rows.items()
        }
        return page.table_section(experiment, numbers, self.seeds)

    def _complete(self, run: Run, seed: int) -> Path:
        return self.runner.complete(dataclasses.replace(run, seed=seed))

    def figure5(self) -> str:
        """Returns the section with accuracy over the number of templates."""
        curves: dict[str, dict[str, dict[int, Spread]]] = {}
        chance = {}
        for task in experiments.SCENE_TASKS:
            curves[task] = {}
            for method, run in experiments.scene_runs(self.scale).items():
                folders = self.folders(run)
                curves[task][method] = {
                    k: spread(folders, task, f"rank_k{k}@1") for k in _TEMPLATES
                }
                chance[task] = 100 / len(np.unique(load_items(folders[0])[task]["labels"]))
        path = figures.plot_templates(curves, chance, self.folder / "figure5.png")
        text = (
            "Zero-shot top-1 on scenes over the number of simple templates; bars are intervals "
            "over seeds. In the paper (Figure 5) CL falls with fewer templates and CWCL does not. "
            f"Here, from {_TEMPLATES[-1]} templates to one, in points: " + _falls(curves) + "."
        )
        return "## Robustness to templates (Figure 5)\n\n" + page.picture(path, self.folder, text)

    def figure6(self) -> str:
        """Returns the section with scenes by their similarity to an anchor."""
        path = similarity_picture(self.folder / "figure6.png", self.scale)
        text = (
            "Scenes sorted by their similarity to an anchor in the locked image tower, and their "
            "weights: the paper's cos/2 + 1/2 leaves most of a batch above 1/2, sharper functions "
            "single out the nearest. CL gives 1 to the anchor and 0 to all others."
        )
        return "## What the loss sees (Figure 6)\n\n" + page.picture(path, self.folder, text)

    def alignment_figure(self, number: int) -> str:
        """Returns the section of Figure 7 or 8: speech against text, six classes."""
        items, numbers = {}, {}
        for method, run in experiments.aligned_runs(self.scale).items():
            folders = self.folders(run)
            if number == 8:
                folders = [self._other_classes(folder) for folder in folders]
            items[method] = load_items(folders[0])["alignment"]
            numbers[method] = spread(folders, "alignment", "block_diagonality")
        path = draw_matrices(items, self.folder / f"figure{number}.png")
        said = ", ".join(f"{method} {value}" for method, value in numbers.items())
        text = (
            f"Cosines between speech and text embeddings of six classes, seed {self.seeds[0]}. The "
            "paper shows CL and CWCL; the last panel has the weights that we recommend. "
            f"Block diagonality x 100 over seeds: {said}."
        )
        title = f"## Alignment (Figure {number})\n\n"
        return title + page.picture(path, self.folder, text)

    def _other_classes(self, folder: Path) -> Path:
        """Runs the alignment task again with other classes; returns its own folder."""
        target = folder / "figure8"
        tasks = target / "tasks.json"
        command = ["python", "-m", "cwcl_jax.evaluate", f"--workdir={folder}", f"--tasks={tasks}"]
        command.append(f"--output={target}")
        self.runner.commands.append(command)
        if (target / "results.md").exists():  # written after the values per item
            return target
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        task = config["evaluation"]["tasks"]["alignment"] | {"seed": 1}
        target.mkdir(exist_ok=True)
        tasks.write_text(json.dumps({"alignment": task}), encoding="utf-8")
        log = target / "reproduce.log"
        if run_process(command, log):
            last = (log.read_text(encoding="utf-8").strip() or "no message").splitlines()[-1]
            raise ConfigError(f"evaluating {folder} with other classes failed: {last}")
        return target


def _falls(curves: Mapping[str, Mapping[str, Mapping[int, Spread]]]) -> str:
    """Returns the change of accuracy from all templates to the first one, by task and method."""
    return "; ".join(
        f"{task} "
        + ", ".join(
            f"{method} {difference(curve[_TEMPLATES[-1]], curve[_TEMPLATES[0]])}"
            for method, curve in methods.items()
        )
        for task, methods in curves.items()
    )


def similarity_picture(path: Path, scale: Scale, *, scenes: int = 300) -> Path:
    """Draws Figure 6 from the locked tower of the scenes' shipped config; returns the path."""
    from cwcl_jax.data.pipeline import eval_batches
    from cwcl_jax.data.sources import open_source
    from cwcl_jax.evaluation.zero_shot import normalise
    from cwcl_jax.reproduction.runs import load_experiment
    from cwcl_jax.training.encode import imported_encoder

    config = load_experiment(experiments.SCENES, scale.scenes)
    encoder, _ = imported_encoder(config)
    source = open_source(f"scenes:test?task=retrieval&n={scenes}")
    batches = eval_batches(source, config.data, ("image",), batch_size=100)
    embeds = [encoder.encode("image", batch["image"], output="features") for batch in batches]
    examples, inputs = [source[index] for index in range(scenes)], config.data.inputs_of("image")
    return figures.plot_similarity(
        (3, 11, 42),
        [inputs.preview(example[inputs.field]) for example in examples],
        normalise(np.concatenate(embeds)[:scenes]),
        path,
        captions=[str(example["text"]) for example in examples],
    )
