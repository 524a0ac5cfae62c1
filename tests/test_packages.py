import sys

import pytest

from cwcl_jax.exit_codes import BAD_CONFIG, exit_code
from cwcl_jax.packages import MissingPackage, import_package


def test_a_missing_package_is_a_mistake_that_a_person_repairs(monkeypatch):
    assert import_package("json", "speech", "Audio").loads("1") == 1
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingPackage, match=r"^Audio needs .*'soxr'.*cwcl_jax\[speech\]") as error:
        import_package("soxr", "speech", "Audio")
    assert exit_code(error.value) == BAD_CONFIG
