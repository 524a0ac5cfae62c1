import importlib
import linecache
import sys

import pytest

from cwcl_jax.data.sources import own_kinds
from cwcl_jax.extension import code_hash, import_named
from cwcl_jax.losses import LossConfig


def test_a_name_leads_to_its_object():
    assert import_named("cwcl_jax.losses:LossConfig", "loss") is LossConfig


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cwcl_jax.losses", "loss .* must have the form 'module:name'"),
        ("cwcl_jax.losses:", "must have the form"),
        ("no_such_module.inner:f", "there is no module 'no_such_module'.*PYTHONPATH"),
        ("cwcl_jax.losses:nothing", "'cwcl_jax.losses' has no 'nothing'"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        import_named(name, "loss")


def test_code_that_is_not_there_has_no_hash():
    assert code_hash("no_such_module:f") == ""
    assert own_kinds("no_such_module:f:path::scenes:train::csv:a:b::other:g:") == [
        "no_such_module:f", "other:g"
    ]  # fmt: skip
    assert own_kinds("no source line") == []


def test_an_error_inside_of_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imports 'surely_not_installed'"):
        import_named("needs_more:f", "loss")


MODULE = """
from helper import scale
from elsewhere import other

WIDTH = 3

class Base:
    width = WIDTH

class Mine(Base):
    def __call__(self, x):
        return scale(x)

class Another:
    pass
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("mine_hashed.py", "return scale(x)", "return scale(x)  # as before", True),
        ("mine_hashed.py", "class Another:", "class Another(Mine):", True),
        ("mine_hashed.py", "return scale(x)", "return -scale(x)", False),
        ("mine_hashed.py", "WIDTH = 3", "WIDTH = 4", False),
        ("helper.py", "2 * x", "3 * x", False),
    ],
)
def test_a_hash_follows_all_that_a_definition_uses(tmp_path, monkeypatch, file, old, new, same):
    (tmp_path / "helper.py").write_text("def scale(x): return 2 * x\n")
    (tmp_path / "elsewhere.py").write_text("other = 1\n")
    (tmp_path / "mine_hashed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def fresh():
        for name in ("mine_hashed", "helper", "elsewhere"):
            sys.modules.pop(name, None)
        linecache.clearcache()
        importlib.invalidate_caches()
        return code_hash("mine_hashed:Mine")

    before = fresh()
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace(old, new))
    assert (fresh() == before) is same
    assert text != text.replace(old, new)
    for name in ("mine_hashed", "helper", "elsewhere"):
        sys.modules.pop(name, None)
