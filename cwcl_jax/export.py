"""Exports a model: `python -m cwcl_jax.export --source=runs/NAME --output=DIR [--format=...]`.

Formats:
    safetensors   a folder for `cwcl_jax.load_model`: model.safetensors, cwcl_jax.json, tokenizer
    transformers  a folder for `transformers.VisionTextDualEncoderModel.from_pretrained`
    clip          a folder for transformers' `CLIPModel` and `CLIPProcessor`, for towers like CLIP's
    image         the image tower as a folder for transformers' `AutoImageProcessor` and the class
                  that its card names (`AutoModel` for a ViT, SigLIP, DINOv2 or DINOv3)
    sentence-transformers
                  the text tower as a folder for `sentence_transformers.SentenceTransformer`
    npz           the image tower as one file in AugReg's layout
    onnx          a folder with one file per tower, by jax2onnx if it is installed

Each also writes a model card: README.md in the folder, or NAME.md next to NAME.npz.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cwcl_jax import cli
from cwcl_jax.api import Model, load_model
from cwcl_jax.config import ConfigError
from cwcl_jax.copies import writing
from cwcl_jax.paths import to_path
from cwcl_jax.pretrained.augreg_npz import write_augreg_npz
from cwcl_jax.pretrained.clip_folder import write_clip_folder
from cwcl_jax.pretrained.dual_encoder import write_dual_encoder
from cwcl_jax.pretrained.folder import below, save_folder
from cwcl_jax.pretrained.image_folder import write_image_folder
from cwcl_jax.pretrained.model_card import is_card, write_card
from cwcl_jax.pretrained.onnx_files import write_onnx
from cwcl_jax.pretrained.sentence_folder import write_sentence_folder

FORMATS = ("safetensors", "transformers", "clip", "image", "sentence-transformers", "npz", "onnx")


def export(model: Model, output: Path, form: str, *, dtype: str = "float32") -> None:
    """Writes `model` to `output` in one of `FORMATS`; `dtype` is for npz."""
    if form == "safetensors":
        save_folder(output, model.description, model.leaves)
    elif form == "transformers":
        write_dual_encoder(output, model.description, model.leaves)
    elif form == "clip":
        write_clip_folder(output, model.description, model.leaves)
    elif form == "image":
        write_image_folder(output, model.description, model.leaves)
    elif form == "sentence-transformers":
        write_sentence_folder(output, model.description, model.leaves)
    elif form == "npz":
        _export_npz(model, output, dtype)
    elif form == "onnx":
        write_onnx(output, model.description, model.leaves)
    else:
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")


def _export_npz(model: Model, output: Path, dtype: str) -> None:
    vits = [name for name, tower in model.description.towers.items() if tower.encoder == "vit"]
    if len(vits) != 1:
        raise ValueError(f"format npz holds one ViT image tower, and this model has {len(vits)}")
    tower = model.description.towers[vits[0]]
    if output.suffix != ".npz":
        raise ValueError(f"format npz writes one file: --output={output} must end in .npz")
    output.parent.mkdir(parents=True, exist_ok=True)
    config = tower.encoder_settings()
    write_augreg_npz(output, config, below(model.leaves, vits[0]), dtype=dtype)


def _write_card(model: Model, output: Path, options: Namespace) -> None:
    card = output.with_suffix(".md") if options.format == "npz" else output / "README.md"
    source = to_path(options.source)
    name = output.stem if options.format == "npz" else output.resolve().name
    write_card(
        card, model.description, options.format, source=source, licence=options.license, name=name
    )


def _check_output(output: Path, form: str) -> None:
    """Raises ConfigError if `output` holds files that are not an earlier export's."""
    if form == "npz":
        if output.is_dir():
            raise ConfigError(f"--output={output} is a folder; format npz writes a file")
        return
    if output.is_file():
        raise ConfigError(f"--output={output} is a file; format {form} writes a folder")
    card = output / "README.md"
    names = sorted(path.name for path in output.glob("*")) if output.is_dir() else []
    if names and not (card.is_file() and is_card(card.read_text("utf-8", "replace"))):
        raise ConfigError(
            f"--output={output} holds files of something else, or of an interrupted export, such "
            f"as {names[0]}: give a new folder, or remove them"
        )


def _define(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", required=True, help="workdir of a run, or an exported folder")
    add("--output", required=True, type=to_path, help="folder to write; a file for npz")
    add("--format", default="safetensors", choices=FORMATS, help="format of the files")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float16"],
        help="dtype of the arrays of an npz",
    )
    add("--step", type=cli.step, help="checkpoint of the run, or best; default: the latest")
    about = "the run's weights: as trained, or their moving averages"
    add("--weights", default="trained", choices=["trained", "ema"], help=about)
    between = "point between the run's start weights (0) and its trained ones (1): WiSE-FT"
    add("--interpolate", type=float, metavar="SHARE", help=between)
    add("--license", default="unknown", help="for the model card, as the hub names it")
    about = "import the modules that an exported folder names, which runs them"
    cli.switch(parser, "allow_code", False, about)


@cli.command(_define)
def main(options: Namespace) -> None:
    """Loads a model and writes it."""
    try:
        # A run's own code is imported as in training; a folder from elsewhere may not be trusted.
        allowed = options.allow_code or (to_path(options.source) / "checkpoints").is_dir()
        model = load_model(
            options.source,
            step=options.step,
            weights=options.weights,
            allow_code=allowed,
            interpolate=options.interpolate,
        )
        _check_output(options.output, options.format)
        with writing(options.output) as output:
            export(model, output, options.format, dtype=options.dtype)
            _write_card(model, output, options)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {options.output} ({options.format})")


if __name__ == "__main__":
    sys.exit(main())
