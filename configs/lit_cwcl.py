"""Trains a text tower against a locked image tower with CWCL (paper, sections 4.1 and A.2).

--config=configs/lit_cwcl.py                      scenes drawn by the package; any laptop
--config=configs/lit_cwcl.py:loss=contrastive     the CL baseline; all else is equal
--config=configs/lit_cwcl.py:weights=relu2        other weights than the paper's `affine`
--config=configs/lit_cwcl.py:projection=trained   a linear projection on the locked side trains too
--config=configs/lit_cwcl.py:test_items=5000      items of each test, instead of 1,000
--config=configs/lit_cwcl.py:paper                the paper's recipe; needs its data and weights
--config=configs/lit_cwcl.py:paper,text=bert      with a pretrained BERT as text tower

The image encoder is always locked. By default it has no projection above it (LiT's way). The
paper's recipe has a trained one, because the paper was probably run so: the evidence is in
README.md, "The locked side's projection".
"""

from typing import Any

from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults, parse_argument
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.recipes import experiment_name, require, set_loss, set_projection

OPTIONS = {
    "paper": False,
    "loss": "cwcl",
    "weights": "affine",
    "projection": "",  # the recipe's own
    "text": "scratch",
    "test_items": 1000,
}
TEXTS = ("scratch", "bert")


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(argument, **OPTIONS)
    require("text", options["text"], TEXTS)
    if options["text"] != "scratch" and not options["paper"]:
        raise ConfigError(f"text={options['text']} needs the paper's recipe: paper,text=...")
    if options["test_items"] < 1:
        raise ConfigError(f"test_items={options['test_items']}: at least one item is tested")
    if options["paper"] and options["test_items"] != OPTIONS["test_items"]:
        raise ConfigError("test_items is for the drawn scenes; the paper's tests are data sets")
    config = defaults(name=experiment_name("lit_cwcl", options, OPTIONS))
    config.loss.weights_from = "image"
    set_loss(config, options)
    if options["paper"]:
        paper(config, options["text"])
    else:
        scenes(config, options["test_items"])
    recipe = "trained" if options["paper"] else "none"
    set_projection(config, "image", options["projection"] or recipe)
    return config


def scenes(config: Any, test_items: int) -> None:
    """Sets pictures of coloured shapes, drawn as they are read; under 3 minutes on two cores."""
    config.total_steps = 200
    config.global_batch_size = 256

    config.data.train = "scenes:train"
    config.data.image.size = 64
    config.data.text.max_tokens = 32

    config.embed_dim = 96
    config.towers.image = defaults(
        TowerConfig,
        encoder="vit",
        preset="tiny",
        weights="package:scenes_vit.npz",
        pooling="mean",
        tune="none",
    )
    config.towers.text = defaults(TowerConfig, encoder="text", preset="tiny")

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 1e-4

    for task in ("shape", "colour", "combination"):
        config.evaluation.tasks[task] = defaults(
            Task,
            kind="zero_shot",
            source=f"scenes:test?task={task}&n={test_items}",
            templates="simple",
            template_counts=(1, 5, 10),
        )
    config.evaluation.tasks.retrieval = defaults(
        Task, kind="retrieval", source=f"scenes:test?task=retrieval&n={test_items}"
    )
    config.checkpoint.every_steps = 100


def paper(config: Any, text: str) -> None:
    """Sets 70 epochs, each of 6 million pairs drawn anew from CC12M and YFCC15M; for 4 A100."""
    config.global_batch_size = 16_000
    config.data.examples_per_epoch = 6_000_000
    config.total_steps = 70 * 6_000_000 // 16_000
    config.dtype = "bfloat16"
    config.accumulation_steps = 4

    config.data.train = "tars:/data/cc12m/{00000..01242}.tar::tars:/data/yfcc15m/{00000..01499}.tar"
    config.data.image.size = 224
    config.data.image.crop_min_area = 0.9
    bert = "google-bert/bert-base-uncased"
    config.data.text.tokenizer = bert
    config.data.text.max_tokens = 77

    config.embed_dim = 1024
    config.towers.image = defaults(
        TowerConfig,
        encoder="vit",
        preset="ViT-L/16",
        weights="/data/augreg/L_16.npz",
        tune="none",
    )
    config.towers.text = (
        defaults(TowerConfig, encoder="bert", preset="BERT-base", weights=bert)
        if text == "bert"
        else defaults(TowerConfig, encoder="text", preset="B", overrides={"vocab_size": 30_522})
    )

    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 1e-4
    # Our choice, because the paper names no warm-up for image-text. Nor does it name the clipping
    # at norm 1, which is our default; clip_norm=0 turns it off.
    config.optimizer.warmup_steps = 1_000
    config.mesh.fsdp = 1

    for dataset in ("imagenet", "imagenetv2", "imagenet-r", "imagenet-a", "imagenet_sketch"):
        config.evaluation.tasks[dataset] = defaults(
            Task,
            kind="zero_shot",
            source=f"clip_benchmark:/data/clip_benchmark/{dataset}",
            templates="simple",
            template_counts=(1, 5, 10),
        )
    config.evaluation.tasks.objectnet = defaults(
        Task,
        kind="zero_shot",
        source="clip_benchmark:/data/clip_benchmark/objectnet",
        templates="simple",
        template_counts=(1, 5, 10),
        crop_border=2,
    )
    config.evaluation.tasks.coco = defaults(
        Task, kind="retrieval", source="clip_benchmark:/data/clip_benchmark/mscoco_captions"
    )
    config.evaluation.every_steps = 3_750
    config.checkpoint.every_steps = 1_000
