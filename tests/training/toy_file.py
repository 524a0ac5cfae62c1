"""The toy run as a config file, for commands: --config=tests/training/toy_file.py."""

from ml_collections import ConfigDict

from cwcl_jax.config import to_plain
from tests.training.toy import toy_config


def get_config() -> ConfigDict:
    return ConfigDict(to_plain(toy_config()))
