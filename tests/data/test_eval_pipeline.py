"""What evaluation counts of examples that cannot be used."""

import pytest

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.pipeline import eval_batches
from tests.data.test_pipeline import Numbers


@pytest.mark.parametrize("size", [4, 40])
def test_unusable_examples_of_evaluation_are_counted_once(size):
    """Also those that stand in for nothing: a batch without a usable one is filled from outside."""
    config = DataConfig(threads=1, max_skipped_share=0.0)
    batches = eval_batches(Numbers(40, bad=tuple(range(10))), config, ("text",), batch_size=size)
    assert sum(int(batch["valid"].sum()) for batch in batches) == 30
    assert batches.skipped == {"image unreadable": 10}


def test_every_pass_of_evaluation_counts_anew():
    config = DataConfig(threads=1, max_skipped_share=0.0)
    batches = eval_batches(Numbers(100, bad=(0, 1, 2, 3)), config, ("text",), batch_size=10)
    for _ in range(3):
        assert len(list(batches)) == 10
        assert batches.skipped == {"image unreadable": 4}
