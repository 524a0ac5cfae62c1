"""All inputs of a source: in order, each example's own, and none without its id."""

import numpy as np
import pytest

from cwcl_jax.data.every_input import EveryInput
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Source
from cwcl_jax.modalities import TextInputs

LONG = "a red circle " * 9
CAPTIONS = [["one"], None, ["two", LONG, LONG], "three", ["", " "]]


class Captions(Source):
    def __len__(self) -> int:
        return 23

    def read(self, index, fields):
        captions = CAPTIONS[index % len(CAPTIONS)]
        if captions is None and "text" in fields:
            raise BadExample("file missing")
        return {"id": f"number {index}", "text": captions}


@pytest.mark.parametrize("every", [True, False])
def test_inputs_come_in_order_with_the_ids_of_unusable_examples(every):
    inputs = TextInputs(max_tokens=8)
    config = DataConfig(inputs={"text": inputs}, threads=2, max_skipped_share=1)
    examples = EveryInput(Captions(), config, "text", every=every, batch_size=8)
    found = list(examples)
    assert [example.id for example in found] == [f"number {index}" for index in range(23)]
    counts = [1, 0, 3 if every else 1, 1, 0]
    assert [len(example.inputs) for example in found] == [counts[i % 5] for i in range(23)]
    assert dict(examples.skipped) == {"file missing": 5, "text empty": 4}
    expected = inputs.loaded(["two", LONG, LONG])["tokens"][: counts[2]]
    np.testing.assert_array_equal([made["tokens"] for made in found[2].inputs], expected)
    # Of the captions that are embedded it is told once what is cut, else that there are others.
    assert len(found[2].told) == 1
    assert ("cut" in found[2].told[0]) == every
    assert found[0].told == ()
