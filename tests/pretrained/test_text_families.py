"""ModernBERT, MPNet and XLM-R compute what transformers' PyTorch models compute, at 1e-5.

The references are tiny, random, and saved by transformers itself; nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.models.modernbert import ModernBertConfig
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete, import_tower
from cwcl_jax.pretrained.importer import recognise
from cwcl_jax.weights.readers import Entry
from cwcl_jax.weights.rules import make_plan
from tests.models.builders import abstract_tower
from tests.pretrained.test_parity import randomise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (12, 7, 1)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def mpnet(width, heads, layers):
    return transformers.MPNetConfig(
        vocab_size=40,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=width + 6,
        max_position_embeddings=202,
    )


def modernbert(width, heads, layers):
    return transformers.ModernBertConfig(
        vocab_size=40,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=width + 6,
        max_position_embeddings=200,
        local_attention=8,
        pad_token_id=1,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    )


def xlm_roberta(pad):
    def make(width, heads, layers):
        return transformers.XLMRobertaConfig(
            vocab_size=40,
            hidden_size=width,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            intermediate_size=width + 6,
            max_position_embeddings=200 + pad + 1,
            type_vocab_size=1,
            pad_token_id=pad,
        )

    return make


FAMILIES = {
    "modernbert": (modernbert, "ModernBertForMaskedLM", 1),
    "mpnet": (mpnet, "MPNetModel", 1),
    "roberta": (xlm_roberta(1), "XLMRobertaModel", 1),
    "roberta, padding 0": (xlm_roberta(0), "XLMRobertaModel", 0),
}
SHAPES = {"small": (24, 4, 2), "odd": (36, 6, 4)}


def texts(pad, length, lengths):
    """Tokens (b, s) with padding on the right, and their mask."""
    tokens = np.random.default_rng(0).integers(2, 40, (len(lengths), length))
    mask = np.arange(length)[None, :] < np.asarray(lengths)[:, None]
    return np.where(mask, tokens, pad), mask


def imported(encoder, folder, **changes):
    """The tower with a folder's own settings and weights, every leaf accounted for."""
    config = complete(TowerConfig(encoder, weights=str(folder), head="none", **changes))
    definition, shapes = abstract_tower(config, _width(config))
    result = import_tower(config, "x", {f"towers/x/{path}": leaf for path, leaf in shapes.items()})
    assert result.initialised == ()
    return definition.merge({p.removeprefix("towers/x/"): x for p, x in result.leaves.items()})


def _width(config):
    settings = config.encoder_settings()
    dense = getattr(settings, "dense", "")
    return int(dense.split(",")[-1].split(":")[0]) if dense else settings.width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_family_equals_pytorch(tmp_path, family, shape):
    make, kind, pad = FAMILIES[family]
    model = randomise(getattr(transformers, kind)(make(*SHAPES[shape])))
    model.save_pretrained(tmp_path)
    # MPNet's farthest distances share buckets, which only a long text shows.
    length, lengths = (150, (150, 70, 1)) if family == "mpnet" else (max(LENGTHS), LENGTHS)
    tokens, mask = texts(pad, length, lengths)
    with torch.no_grad():
        out = getattr(model, "model", model)(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    tower = imported(family.split(",")[0], tmp_path)
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}

    def parts(inputs):
        embedded = tower.encoder.embed(inputs["tokens"], inputs["mask"])
        return embedded, tower.encoder.tokens(inputs), tower(inputs)

    compiled = jax.jit(parts)
    embedded, final, embeds = map(np.asarray, compiled(inputs))
    theirs = out.hidden_states[0].numpy(), out.last_hidden_state.numpy()
    np.testing.assert_allclose(embedded[mask], theirs[0][mask], atol=1e-5)
    np.testing.assert_allclose(final[mask], theirs[1][mask], atol=1e-5)
    # What stands at padded places changes nothing.
    other = inputs | {"tokens": jnp.where(inputs["mask"], inputs["tokens"], 7)}
    np.testing.assert_array_equal(np.asarray(compiled(other)[2]), embeds)


class Shapes:
    """A file of which only names and shapes exist."""

    def __init__(self, state):
        self.source = "published"
        self.entries = {
            name: Entry(tuple(array.shape), np.dtype(np.float32)) for name, array in state.items()
        }

    def read(self, name):
        raise AssertionError(f"{name} is not read")


PUBLISHED = {
    # answerdotai/ModernBERT-base's config.json, in the names of its own time.
    "ModernBERT-base": (
        "modernbert",
        "ModernBertForMaskedLM",
        lambda: transformers.ModernBertConfig(
            global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=10000.0
        ),
        {},
    ),
    # sentence-transformers/all-mpnet-base-v2, whose file also has a buffer.
    "MPNet-base": (
        "mpnet",
        "MPNetModel",
        lambda: transformers.MPNetConfig(max_position_embeddings=514, layer_norm_eps=1e-5),
        {"embeddings.position_ids": (1, 514)},
    ),
    # BAAI/bge-m3 and intfloat/multilingual-e5-base are of this family.
    "XLM-R-base": (
        "roberta",
        "XLMRobertaForMaskedLM",
        lambda: transformers.XLMRobertaConfig(
            vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
        {"roberta.embeddings.position_ids": (1, 514)},
    ),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_size_imports_by_shape(preset):
    encoder, kind, config, buffers = PUBLISHED[preset]
    with torch.device("meta"):
        model = getattr(transformers, kind)(config())
    weights = Shapes(model.state_dict())
    for name, shape in buffers.items():
        weights.entries[name] = Entry(shape, np.dtype(np.int64))
    tower = TowerConfig(encoder, preset, head="none")
    _, shapes = abstract_tower(tower, 768)
    layout = recognise(weights, encoder, "text")
    plan = make_plan(layout.view(weights), layout, shapes)
    assert {assignment.target for assignment in plan.assignments} == set(shapes)


def read(**content):
    from cwcl_jax.models.modernbert import MODERNBERT

    return MODERNBERT.read_config({"model_type": "modernbert", **content})


def test_the_patterns_of_modernbert_are_read_from_older_and_newer_files():
    older = read(global_attn_every_n_layers=4, global_rope_theta=9.0, local_rope_theta=3.0)
    newer = read(
        layer_types=["full_attention", *["sliding_attention"] * 3] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 9.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
        },
    )
    assert older == newer == {"global_every": 4, "global_theta": 9.0, "local_theta": 3.0}
    assert ModernBertConfig(**newer).global_every == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"norm_bias": True}, "norm_bias: a ModernBERT with biases"),
        ({"rope_scaling": {"type": "yarn"}}, "only plain rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is not a pattern"),
    ],
)
def test_a_modernbert_of_another_kind_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read(**content)


@pytest.mark.parametrize("encoder", ["modernbert", "mpnet"])
def test_layers_that_are_not_alike_are_not_scanned(encoder):
    with pytest.raises(ValueError, match="scan_layers=False"):
        abstract_tower(TowerConfig(encoder, "tiny", scan_layers=True), 8)


@pytest.mark.parametrize(
    ("encoder", "kind", "message"),
    [
        ("bert", "RobertaModel", r"is a roberta.*encoder 'bert' reads.*encoder to 'roberta'"),
        ("bert", "XLMRobertaModel", r"is a xlm-roberta, as its config.json says.*'roberta'"),
        ("roberta", "BertModel", r"is a bert, .*no roberta or xlm-roberta.*encoder to 'bert'"),
        ("bert", "ElectraModel", r"is a electra.*no encoder reads it"),
    ],
)
def test_another_model_of_the_same_names_is_refused_by_its_name(tmp_path, encoder, kind, message):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 20, "intermediate_size": 12}
    model = getattr(transformers, kind)
    model(model.config_class(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(WeightsMismatch, match=message):
        import_tower(TowerConfig(encoder, "tiny", weights=str(tmp_path)), "text", {})
