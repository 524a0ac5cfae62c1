"""The strict conversion of settings."""

import dataclasses
from collections.abc import Mapping

import pytest

from cwcl_jax import config as config_module
from cwcl_jax.config import (
    ConfigError,
    convert,
    defaults,
    from_json,
    parse_argument,
    to_json,
    to_plain,
)
from tests.training.toy import toy_config


def test_json_text_resolves_to_the_same_experiment():
    config = toy_config(**{"optimizer.multipliers": ("towers/text/head/.*=0.5",)})
    assert from_json(to_json(config)) == config


def test_unknown_field_names_the_nearest_known_one():
    plain = config_module.to_plain(toy_config())
    plain["optimizer"]["learnin_rate"] = 1.0
    with pytest.raises(ConfigError, match=r"config\.optimizer .*did you mean 'learning_rate'"):
        config_module.from_config_dict(plain)


def test_all_that_is_wrong_is_told_at_once():
    """A line each: types and names together, and what contradicts what together."""
    plain = config_module.to_plain(toy_config())
    plain |= {"seed": "x", "dtpe": "float32"}
    plain["optimizer"] |= {"learnin_rate": 1.0, "clip_norm": "no"}
    plain["towers"]["text"]["tne"] = "all"
    with pytest.raises(ConfigError) as refused:
        config_module.from_config_dict(plain)
    told = str(refused.value)
    assert len(told.splitlines()) == 5, told
    assert all(name in told for name in ("'tne'", "'dtpe'", "config.seed", "'learnin_", "clip_n"))
    plain = config_module.to_plain(toy_config())
    plain |= {"dtpe": "float32", "total_steps": 0}
    plain["data"] |= {"imge": {}, "threads": "x"}
    with pytest.raises(ConfigError) as refused:
        config_module.from_config_dict(plain)
    told = str(refused.value)
    assert len(told.splitlines()) == 3, told  # contradictions need values of the right types
    assert all(name in told for name in ("'dtpe'", "'imge'", "config.data.threads"))
    del plain["data"]["threads"]
    with pytest.raises(ConfigError, match=r"(?s)total_steps must be at least 1.*'dtpe'"):
        config_module.from_config_dict(plain)
    with pytest.raises(ConfigError) as refused:
        toy_config(total_steps=0, dtype="float61", profile="x", precision="most")
    lines = str(refused.value).splitlines()
    assert [line.split("=")[0].split(" ")[0] for line in lines] == [
        "config.total_steps", "config.dtype", "config.precision:", "config.profile"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("total_steps", "many", r"config\.total_steps must be int"),
        ("total_steps", True, r"config\.total_steps must be int"),
        ("global_batch_size", 1, r"global_batch_size=1 trains nothing"),
        ("total_steps", 0, r"config\.total_steps must be at least 1"),
        ("accumulation_steps", 3, r"global_batch_size=16 is not divisible"),
        ("dtype", "float16", r"config\.dtype"),
        ("loss.weights_from", "speech", r"'speech' is not one of the towers"),
        ("loss.name", "cvcl", r"config\.loss: .*cvcl"),
        ("loss", {"name": "cellclip", "weight_function": "relu"}, r"config\.loss: .*'cellclip'"),
        ("loss", {"weight_function": "exp", "detach_weights": False}, r"config\.loss: detach_w"),
        ("optimizer.schedule", "linear", r"config\.optimizer: schedule='linear'"),
        ("temperature.initial", -1.0, r"config\.temperature: initial"),
        ("optimizer.clip_norm", -1.0, r"clip_norm=-1\.0 must not be negative; 0 disables clipping"),
        ("optimizer.learning_rate", -1.0, r"learning_rate=-1\.0 must not be negative"),
        ("optimizer.learning_rate", float("nan"), r"learning_rate=nan"),
        ("optimizer.warmup_steps", -5, r"config\.optimizer: warmup_steps=-5"),
        ("optimizer.weight_decay", -0.1, r"weight_decay=-0\.1"),
        ("optimizer.b2", 1.0, r"b2=1\.0 must be in \[0, 1\)"),
        ("optimizer.rsqrt_timescale", 0, r"rsqrt_timescale=0 must be at least 1"),
        ("checkpoint.every_steps", -1, r"config\.checkpoint: every_steps=-1"),
        ("checkpoint.keep", -1, r"keep=-1 must not be negative; 0 keeps all"),
        ("checkpoint.keep_every", -1, r"keep_every=-1"),
        ("logging.every_steps", 0, r"config\.logging: every_steps=0 must be at least 1"),
        ("mesh.fsdp", 0, r"config\.mesh: fsdp=0 must be at least 1"),
        ("distributed.num_processes", -1, r"num_processes=-1"),
    ],
)
def test_wrong_value_is_an_error_that_names_the_field(path, value, message):
    plain = config_module.to_plain(toy_config())
    inner = plain
    *parents, last = path.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    with pytest.raises(ConfigError, match=message):
        config_module.from_config_dict(plain)


def test_integers_become_floats_where_floats_are_wanted():
    assert toy_config(**{"optimizer.clip_norm": 2}).optimizer.clip_norm == 2.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Stands for several classes: the number of corners tells them apart."""

    corners: int = 0

    @classmethod
    def variant(cls, given):
        if given.get("corners", 0) not in (0, 4):
            raise ValueError(f"there is no shape with {given['corners']} corners")
        return (Square if given.get("corners") else Circle), dict(given)


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    sides: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Drawing:
    shapes: Mapping[str, Shape]


def test_given_fields_choose_the_class():
    plain = {"shapes": {"a": {"radius": 2}, "b": {"corners": 4, "sides": [1, 2]}}}
    drawing = convert(Drawing, plain, "config")
    assert drawing == Drawing({"a": Circle(radius=2.0), "b": Square(4, (1.0, 2.0))})
    assert convert(Drawing, to_plain(drawing), "config") == drawing
    assert defaults(Shape, corners=4).to_dict() == {"corners": 4, "sides": (1.0,)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radus": 2.0}, r"config\.shapes\.a has no field 'radus'; did you mean 'radius'"),
        ({"sides": ()}, r"config\.shapes\.a has no field 'sides'"),
        ({"corners": 4, "sides": ["x"]}, r"config\.shapes\.a\.sides\[0\] must be float"),
        ({"corners": 3}, r"config\.shapes\.a: there is no shape with 3 corners"),
    ],
)
def test_fields_are_those_of_the_chosen_class(fields, message):
    with pytest.raises(ConfigError, match=message):
        convert(Drawing, {"shapes": {"a": fields}}, "config")
    with pytest.raises(ConfigError, match="Circle has no field 'radus'"):
        defaults(Shape, radus=2.0)


def test_one_tower_is_an_error():
    plain = config_module.to_plain(toy_config())
    del plain["towers"]["text"]
    with pytest.raises(ConfigError, match="two modalities"):
        config_module.from_config_dict(plain)


def test_config_argument_options():
    options = {"paper": False, "loss": "cwcl", "batch": 20}
    assert parse_argument("", **options) == options
    assert parse_argument("paper,loss=contrastive,batch=40", **options) == {
        "paper": True,
        "loss": "contrastive",
        "batch": 40,
    }
    with pytest.raises(ConfigError, match="did you mean 'loss'"):
        parse_argument("los=cwcl", **options)
    for cut in ("loss", "loss=", "batch"):  # a bare word would leave the default without a word
        with pytest.raises(ConfigError, match=f"'{cut}': {cut.rstrip('=')}=VALUE is expected"):
            parse_argument(cut, **options)
    with pytest.raises(ConfigError, match="a whole number is expected"):
        parse_argument("batch=many", **options)


def test_modalities_are_u_then_v():
    assert toy_config().tower_names == ("image", "text")
    assert toy_config(**{"loss.weights_from": "text"}).tower_names == ("text", "image")
