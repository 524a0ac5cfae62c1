"""The chip table and the names of meshes."""

from __future__ import annotations

import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.planning.chips import CHIPS, parse_mesh


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [("a100x4", "a100-80", 4), ("a100-40x8", "a100-40", 8), ("v5e:256", "v5e", 256),
     ("H100", "h100", 1), ("tpu-v4x512", "v4", 512), ("h100 x8", "h100", 8)],
)  # fmt: skip
def test_mesh_names(text, chip, devices):
    found, count = parse_mesh(text)
    assert (found.name, count) == (chip, devices)


def test_unknown_chip_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'h200'.*a100x4"):
        parse_mesh("h20x4")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("v5e-64", "v5ex64"), ("tpu-v6e-8", "tpu-v6ex8"), ("h100-8", "h100x8"), ("v4-64", "v4x32")],
)
def test_slices_as_google_names_them_are_understood(text, meant):
    """v4-64 has 64 cores, two a chip; v5e-64 has 64 chips."""
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        parse_mesh(text)


@pytest.mark.parametrize("text", ["a100x0", "", "x4", "a100x", "a100x100000"])
def test_a_mesh_that_cannot_be_is_an_error(text):
    with pytest.raises(ConfigError, match="--mesh="):
        parse_mesh(text)


def test_every_chip_has_a_source_and_plausible_figures():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.half >= chip.single >= chip.high > chip.highest > 0
        assert chip.network < chip.link < chip.bandwidth
        assert chip.sends(chip.island) == chip.link > chip.sends(chip.island + 1)
