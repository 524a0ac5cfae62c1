"""`python -m cwcl_jax.check`: every check runs here, at sizes for two cores."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax import check
from cwcl_jax.checking import numerics
from cwcl_jax.checking.findings import FAIL, LOOK, PASS, Finding, Machine, run_checks, table
from cwcl_jax.checking.step import noise
from cwcl_jax.losses import cwcl_loss

TINY = Machine(tiny=True, until=0.0)


@pytest.mark.slow
def test_all_checks_run_on_two_cores(tmp_path, capsys):
    """Slow: it compiles a step, five losses and their gradients."""
    found = list(run_checks(TINY, check.checks_of(None, tiny=True)))
    assert all(finding.verdict != FAIL for finding in found), table(found)
    by_name = {finding.check: finding for finding in found}
    assert by_name["same step twice"].verdict == PASS
    assert by_name["step"].values["pairs_per_second"] > 0
    assert {"fused_ms", "dense_ms"} <= by_name["loss, 512 pairs of 32, bfloat16"].values.keys()
    check._write(tmp_path / "new", found, table(found))
    rows = json.loads((tmp_path / "new" / "check.json").read_text())
    assert [row["check"] for row in rows] == [finding.check for finding in found]
    assert capsys.readouterr().out.strip() == (tmp_path / "new" / "check.txt").read_text().strip()


def test_numbers_are_checked_and_pass():
    """The part of all checks that needs no step."""
    names = ("devices", "products", "loss", "tokens")
    chosen = [found for found in check.checks_of(None, tiny=True) if found[0] in names]
    assert len(chosen) == len(names)
    found = list(run_checks(TINY, chosen))
    assert all(finding.verdict != FAIL for finding in found), table(found)


def test_an_exception_is_a_finding_and_the_rest_goes_on(capsys):
    def broken(_):
        yield Finding("first", PASS, "ok")
        raise RuntimeError("no such kernel")

    def fine(_):
        yield Finding("last", PASS, "ok")

    found = list(run_checks(TINY, [("broken", 0, broken), ("fine", 0, fine)]))
    assert [(f.check, f.verdict) for f in found] == [
        ("first", PASS), ("broken", FAIL), ("last", PASS),
    ]  # fmt: skip
    assert "RuntimeError: no such kernel" in found[1].found
    assert "Traceback" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_said():
    machine = Machine(tiny=False, until=time.perf_counter() + 5)
    (finding,) = run_checks(machine, [("long", 60, pytest.fail)])
    assert (finding.verdict, finding.found) == (LOOK, "not measured: out of time")


def test_the_exact_loss_is_the_loss():
    u, v = numerics.pairs(32, 16)
    value, _, _ = numerics.exact_cwcl(u, v, 20.0)
    arrays = jnp.asarray(u), jnp.asarray(v)
    ours, _ = cwcl_loss(*arrays, logit_scale=jnp.log(20.0), weights_from=arrays[0])
    assert float(ours) == pytest.approx(value, rel=1e-5)
    step = 1e-6
    _, du, dv = numerics.exact_cwcl(u, v, 20.0)
    direction = np.random.default_rng(1).standard_normal(v.shape)
    moved = [numerics.exact_cwcl(u, v + s * step * direction, 20.0)[0] for s in (1, -1)]
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx((dv * direction).sum(), rel=1e-4)
    assert du.shape == u.shape


@pytest.mark.parametrize("check_", [numerics.products, numerics.loss, numerics.token_table])
def test_wrong_numbers_fail(check_, monkeypatch):
    """Errors of bfloat16 where float32, or sums in float32, are promised."""
    monkeypatch.setattr(numerics, "relative", lambda found, exact: 3e-2)
    (finding,) = check_(TINY)
    assert finding.verdict == FAIL
    assert "more than" in finding.advice


def test_noise_is_legal():
    made = noise(
        {
            "length": jnp.zeros((4,), jnp.int32),
            "mask": jnp.zeros((4, 3), bool),
            "tokens": jnp.zeros((4, 3), jnp.int32),
            "pixels": jnp.zeros((4, 2, 2, 3), jnp.uint8),
        }
    )
    assert made["mask"].all()
    assert made["length"].min() > 10**9
    assert 0 <= made["tokens"].min() <= made["tokens"].max() < 256
    assert made["pixels"].dtype == np.uint8
