import pytest

from cwcl_jax.extension import import_named
from cwcl_jax.losses import LossConfig


def test_a_name_leads_to_its_object():
    assert import_named("cwcl_jax.losses:LossConfig", "a loss") is LossConfig


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cwcl_jax.losses", "a loss .* must have the form 'module:name'"),
        ("cwcl_jax.losses:", "must have the form"),
        ("no_such_module.inner:f", "there is no module 'no_such_module'.*PYTHONPATH"),
        ("cwcl_jax.losses:nothing", "'cwcl_jax.losses' has no 'nothing'"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        import_named(name, "a loss")


def test_an_error_inside_of_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imports 'surely_not_installed'"):
        import_named("needs_more:f", "a loss")
