"""Differences between two starts of a run."""

import dataclasses

from cwcl_jax.config import from_json, to_json
from cwcl_jax.training.changes import changed_fields
from tests.training.toy import toy_config


def test_changed_fields_are_dotted_paths():
    old = toy_config()
    new = dataclasses.replace(old, seed=3)
    assert changed_fields(old, new) == {"config.seed": (old.seed, new.seed)}
    assert changed_fields(old, from_json(to_json(old))) == {}
