"""Writes a model card: README.md next to an export, with the hub's front matter.

It states only what the run's own files record: sources of the towers, data, command, and results
with intervals if the evaluation belongs to the exported step. Anything that was not recorded (the
licence) is "unknown" unless it is given.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cwcl_jax.files import parse_json, write_text
from cwcl_jax.pretrained.folder import ModelDescription
from cwcl_jax.pretrained.image_folder import opened_as

# The hub's terms: which library opens an export, and which widget shows it.
_LIBRARIES = {
    "sentence-transformers": ("sentence-transformers", "sentence-similarity"),
    "clip": ("transformers", "zero-shot-image-classification"),
    "transformers": ("transformers", "zero-shot-image-classification"),
    "image": ("transformers", "image-feature-extraction"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CITATION = """@inproceedings{srinivasa2023cwcl,
  title     = {{CWCL}: Cross-Modal Transfer with Continuously Weighted Contrastive Loss},
  author    = {Srinivasa, Rakshith Sharma and Cho, Jaejin and Yang, Chouchang and
               Saidutta, Yashas Malur and Lee, Ching-Hua and Shen, Yilin and Jin, Hongxia},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""
# In every card; `is_card` knows a card by it.
_MADE_WITH = "with cwcl_jax (Continuously Weighted Contrastive Loss)"
_USE = {
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
embeds = model.encode(["a photo of a cat", "a photo of a dog"])""",
    "clip": """from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("{name}"), CLIPProcessor.from_pretrained("{name}")""",
    "transformers": """from transformers import VisionTextDualEncoderModel

model = VisionTextDualEncoderModel.from_pretrained("{name}")""",
    "image": """import torch
from transformers import AutoImageProcessor, {opened_by}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {opened_by}.from_pretrained("{name}").eval()
with torch.no_grad():
    outputs = model(**processor(pictures, return_tensors="pt"))
embeds = torch.nn.functional.normalize(outputs.{output})""",
    "safetensors": """import cwcl_jax

model = cwcl_jax.load_model("{name}")""",
}


def write_card(
    path: Path,
    description: ModelDescription,
    form: str,
    *,
    source: Path | None = None,
    licence: str = "unknown",
    name: str = "",
) -> None:
    """Writes the card of an export.

    Args:
      path: README.md next to it.
      description: description of the exported model.
      form: the format of the export.
      source: workdir of the run, whose records are reported; without it only the description is.
      licence: the hub's name of the licence, such as "apache-2.0".
      name: name of the export.
    """
    name = name or path.parent.name
    bases = _base_models(description)
    parts = [
        _front(form, licence, bases),
        f"# {name}",
        _about(description, form),
        _use(form, name, description),
        _training(description, source),
        _results(description, source),
        _limits(bases),
        "## Citation\n\n```bibtex\n" + _CITATION + "\n```",
    ]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def is_card(text: str) -> bool:
    """Returns whether a text is a card that `write_card` wrote."""
    return _MADE_WITH in text


def _base_models(description: ModelDescription) -> list[str]:
    """Returns the hub ids of the weights that the towers were initialised from."""
    found = [tower.weights.partition("@")[0] for tower in description.towers.values()]
    names = [weights for weights in found if _HUB_ID.fullmatch(weights)]
    return list(dict.fromkeys(name for name in names if not Path(name).exists()))


def _front(form: str, licence: str, bases: Sequence[str]) -> str:
    library, task = _LIBRARIES.get(form, ("cwcl_jax", ""))
    lines = ["---", f"license: {_yaml(licence)}", f"library_name: {library}"]
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += ["base_model:", *(f"- {_yaml(base)}" for base in bases)] if bases else []
    lines += ["tags:", "- cwcl", "- contrastive-learning", "- cross-modal", "---"]
    return "\n".join(lines)


def _yaml(text: str) -> str:
    """Returns a string as YAML reads it: in JSON's form unless it is a plain word."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)


def _about(description: ModelDescription, form: str) -> str:
    rows = []
    for name, tower in description.towers.items():
        if tower.encoder == "precomputed":
            began = "no parameters: features made elsewhere"
        else:
            began = _shown(tower.weights) if tower.weights else "random numbers"
        size = f" {tower.preset}" if tower.preset else ""
        tuned = {"none": "locked", "all": "trained"}.get(tower.tune, f"trained: `{tower.tune}`")
        inputs = description.inputs[name].name
        rows.append(f"| {name} | {inputs} | {tower.encoder}{size} | {began} | {tuned} |")
    loss = description.origin.get("loss", "")
    table = "\n".join(
        ["| tower | reads | encoder | began with | |", "|---|---|---|---|---|", *rows]
    )
    held = {
        "sentence-transformers": "This folder holds the text tower alone. ",
        "image": "This folder holds the image tower alone. ",
        "npz": "The file next to this card holds the image tower alone. ",
    }.get(form, "")
    aligned = f"by the loss `{loss}` " if loss else ""
    return (
        f"Two towers whose embeds were aligned {aligned}{_MADE_WITH}. {held}"
        f"Embeds have {description.embed_dim} numbers and unit length.\n\n" + table
    )


def _shown(weights: str) -> str:
    """Returns a source without the folders of the machine that it was on."""
    return f"`{weights if _HUB_ID.fullmatch(weights) or ':' in weights else Path(weights).name}`"


def _use(form: str, name: str, description: ModelDescription) -> str:
    if form not in _USE:
        return ""
    opened_by, output = opened_as(description) if form == "image" else ("", "")
    code = _USE[form].format(name=name, opened_by=opened_by, output=output)
    return f"## Use\n\n```python\n{code}\n```"


def _record(source: Path | None, name: str) -> Any:
    """Returns the content of a file of a run; empty if there is none."""
    file = None if source is None else source / name
    return parse_json(file.read_bytes()) if file is not None and file.exists() else {}


def _training(description: ModelDescription, source: Path | None) -> str:
    config, environment = _record(source, "config.json"), _record(source, "environment.json")
    lines = [f"- {key}: {value}" for key, value in description.origin.items() if key != "code"]
    data = config.get("data", {}).get("train")
    lines += [f"- data: `{data}`"] if data else []
    command = environment.get("command")
    if command:
        program, *options = command
        words = ["python -m cwcl_jax." + Path(program).stem, *map(_quoted, options)]
        lines.append(f"- command: `{' '.join(words)}`")
    packages = environment.get("packages", {})
    used = [
        f"{name} {packages[name]}" for name in ("cwcl_jax", "jax", "flax") if packages.get(name)
    ]
    lines += [f"- versions: {', '.join(used)}"] if used else []
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _quoted(option: str) -> str:
    return f"'{option}'" if re.search(r"[\s;&|*?()<>]", option) else option


def _results(description: ModelDescription, source: Path | None) -> str:
    """Returns the results of the exported step, with their intervals and chance levels."""
    records = _record(source, "results.json")
    step = description.origin.get("step")
    if not records:
        return ""
    rows = [
        _row(record, metric, value)
        for record in records
        if record.get("pretrained") == f"step {step}"
        for metric, value in record["metrics"].items()
    ]
    if not rows:
        return (
            "## Results\n\nNone of this step: the run's results belong to "
            f"{records[0].get('pretrained') or 'another model'}."
        )
    header = [
        "| task | data | metric | value | interval | chance |",
        "|---|---|---|---:|---:|---:|",
    ]
    return "## Results\n\n" + "\n".join([*header, *rows])


def _row(record: Mapping[str, Any], metric: str, value: Any) -> str:
    interval, chance = record.get("intervals", {}).get(metric), record.get("chance", {}).get(metric)
    low_high = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    cells = [
        record.get("name") or record.get("task", ""),
        record.get("dataset", ""),
        metric,
        f"{value:.4f}" if isinstance(value, (int, float)) else "",
        low_high,
        f"{chance:.4f}" if isinstance(chance, (int, float)) else "",
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _limits(bases: Sequence[str]) -> str:
    lines = [
        "- Gaps and biases of the training data, and of the towers' earlier training, are in the "
        "embeds.",
        "- Measured only on the tasks above, if there are any: measure on your own data.",
        "- Texts and recordings longer than the inputs are truncated, pictures of other shapes "
        "cropped.",
    ]
    if bases:
        lines.append(
            f"- The licences of {', '.join(bases)} also apply to models derived from them."
        )
    return "## Limits\n\n" + "\n".join(lines)
