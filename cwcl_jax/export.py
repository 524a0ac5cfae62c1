"""Exports a model: `python -m cwcl_jax.export --source=runs/NAME --output=DIR [--format=...]`.

Formats:
    safetensors   a folder for `cwcl_jax.load_model`: model.safetensors, cwcl_jax.json, tokenizer
    transformers  a folder for `transformers.VisionTextDualEncoderModel.from_pretrained`
    npz           the image tower as one file in AugReg's layout
"""

from pathlib import Path

from absl import app, flags

from cwcl_jax.api import Model, load_model
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.pretrained.augreg_npz import write_augreg_npz
from cwcl_jax.pretrained.dual_encoder import write_dual_encoder
from cwcl_jax.pretrained.folder import below, save_folder

FORMATS = ("safetensors", "transformers", "npz")


def export(model: Model, output: Path, form: str, *, dtype: str = "float32") -> None:
    """Write `model` to `output` in one of `FORMATS`; `dtype` is for npz."""
    if form == "safetensors":
        save_folder(output, model.description, model.leaves)
    elif form == "transformers":
        write_dual_encoder(output, model.description, model.leaves)
    elif form == "npz":
        _export_npz(model, output, dtype)
    else:
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")


def _export_npz(model: Model, output: Path, dtype: str) -> None:
    tower = model.description.towers.get("image")
    if tower is None or tower.encoder != "vit":
        raise ValueError("format npz holds a ViT image tower, and this model has none")
    if output.suffix != ".npz":
        raise ValueError(f"format npz writes one file: --output={output} must end in .npz")
    output.parent.mkdir(parents=True, exist_ok=True)
    config = encoder_config(tower.encoder, tower.preset, tower.overrides, tower.pooling)
    write_augreg_npz(output, config, below(model.leaves, "image"), dtype=dtype)


def main(argv: list[str]) -> None:
    """Parse, load, write."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    values = flags.FLAGS.flag_values_dict()
    step = values["step"] if values["step"] >= 0 else None
    try:
        model = load_model(values["source"], step=step)
        export(model, Path(values["output"]), values["format"], dtype=values["dtype"])
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {values['output']} ({values['format']})")


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("source", None, "Workdir of a run, or an exported folder.", required=True)
    flags.DEFINE_string("output", None, "Folder to write; a file for npz.", required=True)
    flags.DEFINE_enum("format", "safetensors", FORMATS, "What to write.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "float16"), "Type of numbers in an npz.")
    flags.DEFINE_integer("step", -1, "Checkpoint of the run; -1 is the latest.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
