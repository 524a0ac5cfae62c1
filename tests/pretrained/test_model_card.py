"""The card beside an export says what the run's files say, in the hub's form."""

import json

import pytest
import yaml

from cwcl_jax.export import main
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.folder import ModelDescription, save_folder
from cwcl_jax.pretrained.model_card import write_card
from tests.test_api import INPUTS, model

TOWERS = {
    "image": TowerConfig(
        "vit", "ViT-B/16", weights="google/vit-base-patch16-224@main", tune="none"
    ),
    "text": TowerConfig("bert", "BERT-base", weights="/secret/place/bert"),
}
RECORD = {
    "name": "pets",
    "task": "zeroshot_classification",
    "dataset": "tfds:oxford_iiit_pet",
    "pretrained": "step 30",
    "metrics": {"acc1": 0.8125, "acc5": 0.9},
    "intervals": {"acc1": [0.78, 0.84]},
    "chance": {"acc1": 0.027},
}


def card(tmp_path, step=30, **options):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "results.json").write_text(json.dumps([RECORD]))
    (run / "config.json").write_text(json.dumps({"data": {"train": "tars:/data/cc3m"}}))
    command = ["/opt/place/train.py", "--config=configs/lit_cwcl.py", "--config.a=x y"]
    (run / "environment.json").write_text(json.dumps({"command": command}))
    description = ModelDescription(
        TOWERS, 512, inputs={n: INPUTS[n] for n in TOWERS}, origin={"loss": "cwcl", "step": step}
    )
    write_card(tmp_path / "README.md", description, "clip", source=run, name="pets", **options)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_and_tables_are_those_of_the_run(tmp_path):
    front, body = card(tmp_path, licence="apache-2.0")
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert front["base_model"] == ["google/vit-base-patch16-224"]
    assert "cwcl" in front["tags"]
    assert "| pets | tfds:oxford_iiit_pet | acc1 | 0.8125 | 0.7800 to 0.8400 | 0.0270 |" in body
    assert "| pets | tfds:oxford_iiit_pet | acc5 | 0.9000 |  |  |" in body
    assert "- data: `tars:/data/cc3m`" in body
    assert "python -m cwcl_jax.train --config=configs/lit_cwcl.py '--config.a=x y'" in body
    assert "srinivasa2023cwcl" in body
    # Folders of the machine are nobody's business.
    assert "secret" not in body
    assert "/opt/place" not in body
    assert "`bert`" in body


def test_results_of_another_step_are_not_those_of_the_model(tmp_path):
    front, body = card(tmp_path, step=20)
    assert front["license"] == "unknown"
    assert "0.8125" not in body
    assert "None of this step: the run's results belong to step 30" in body


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_every_export_of_the_command_line_has_a_card(tmp_path, form):
    two = model()
    save_folder(tmp_path / "source", two.description, two.leaves)
    output = tmp_path / ("image.npz" if form == "npz" else "out")
    arguments = [f"--source={tmp_path / 'source'}", f"--output={output}", f"--format={form}"]
    assert main([*arguments, "--license=mit"]) == 0
    text = (tmp_path / ("image.md" if form == "npz" else "out/README.md")).read_text()
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "mit"
    assert "random numbers" in text
