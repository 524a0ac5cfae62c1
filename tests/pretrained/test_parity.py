"""Imported towers compute what transformers' PyTorch models compute, whole and by part, at 1e-5.

The references are tiny, random, and saved by transformers itself; nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.models.leaves import split
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import import_tower
from tests.models.builders import abstract_tower

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT_SIZES = {"vocab_size": 40, "width": 24, "depth": 3, "heads": 4, "mlp_width": 36}
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def randomise(model):
    """Norms and biases start as ones and zeros, which would hide a wrong assignment."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def imported(config, folder):
    """The tower with the weights of a folder, every leaf accounted for."""
    config = TowerConfig(**config, weights=str(folder), head="none")
    width = config.overrides["width"]
    definition, shapes = abstract_tower(config, width)
    leaves = import_tower(config, "x", {f"towers/x/{p}": s for p, s in shapes.items()}).leaves
    return definition.merge({p.removeprefix("towers/x/"): leaf for p, leaf in leaves.items()})


def text_inputs(lengths=(7, 3, 1), size=7, first=2):
    tokens = RNG.integers(first, 40, (len(lengths), size))
    mask = np.arange(size)[None, :] < np.asarray(lengths)[:, None]
    return np.where(mask, tokens, 1), mask


def run(module_function, *args):
    return np.asarray(jax.jit(module_function)(*args))


def check_text(reference, tower, *, pad_token, with_types=False):
    tokens, mask = text_inputs()
    tokens = np.where(mask, tokens, pad_token)
    with torch.no_grad():
        out = reference(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}
    embedded = run(lambda i: tower.encoder.embed(i["tokens"], i["mask"]), inputs)
    final = run(tower.encoder.tokens, inputs)
    np.testing.assert_allclose(embedded[mask], out.hidden_states[0].numpy()[mask], atol=1e-5)
    np.testing.assert_allclose(final[mask], out.last_hidden_state.numpy()[mask], atol=1e-5)
    return out, inputs, mask


@pytest.mark.parametrize("prefix", [False, True])
def test_bert_equals_pytorch(tmp_path, prefix):
    config = transformers.BertConfig(**TEXT, intermediate_size=36, max_position_embeddings=9)
    kind = transformers.BertForMaskedLM if prefix else transformers.BertModel
    model = randomise(kind(config))
    model.save_pretrained(tmp_path)
    overrides = BERT_SIZES | {"max_tokens": 9}
    tower = imported({"encoder": "bert", "overrides": overrides, "pooling": "mean"}, tmp_path)
    reference = model.bert if prefix else model
    out, inputs, mask = check_text(reference, tower, pad_token=0)
    weights = mask[:, :, None] / mask.sum(1)[:, None, None]
    mean = (out.last_hidden_state.numpy() * weights).sum(1)
    np.testing.assert_allclose(run(tower.features, inputs), mean, atol=1e-5)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(run(tower, inputs), unit, atol=1e-5)


def test_berts_own_pooler_equals_pytorch(tmp_path):
    config = transformers.BertConfig(**TEXT, intermediate_size=36, max_position_embeddings=9)
    model = randomise(transformers.BertModel(config))
    model.save_pretrained(tmp_path)
    overrides = BERT_SIZES | {"max_tokens": 9}
    tower = imported({"encoder": "bert", "overrides": overrides, "pooling": "pooler"}, tmp_path)
    out, inputs, _ = check_text(model, tower, pad_token=0)
    np.testing.assert_allclose(run(tower.features, inputs), out.pooler_output.numpy(), atol=1e-5)


def test_roberta_equals_pytorch_with_its_position_offset(tmp_path):
    config = transformers.RobertaConfig(
        **TEXT,
        intermediate_size=36,
        max_position_embeddings=11,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = randomise(transformers.RobertaModel(config))
    model.save_pretrained(tmp_path)
    overrides = BERT_SIZES | {"max_tokens": 9}
    tower = imported({"encoder": "roberta", "overrides": overrides}, tmp_path)
    check_text(model, tower, pad_token=1)


@pytest.mark.parametrize("scale", [False, True])
def test_bart_encoder_equals_pytorch(tmp_path, scale):
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=36,
        decoder_ffn_dim=36,
        max_position_embeddings=9,
        scale_embedding=scale,
    )
    model = randomise(transformers.BartForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    overrides = BERT_SIZES | {"max_tokens": 9, "scale_embedding": scale}
    tower = imported({"encoder": "bart", "overrides": overrides}, tmp_path)
    check_text(model.get_encoder(), tower, pad_token=1)


@pytest.mark.parametrize(("theirs", "ours"), [("gelu", "gelu_erf"), ("gelu_new", "gelu_tanh")])
def test_vit_equals_pytorch(tmp_path, theirs, ours):
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=36,
        image_size=16,
        patch_size=4,
        hidden_act=theirs,
    )
    model = randomise(transformers.ViTModel(config))
    model.save_pretrained(tmp_path)
    overrides = {
        "width": 24,
        "depth": 3,
        "heads": 4,
        "mlp_width": 36,
        "image_size": 16,
        "patch_size": 4,
        "activation": ours,
        "epsilon": 1e-12,
    }
    tower = imported({"encoder": "vit", "overrides": overrides}, tmp_path)
    pixels = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
    values = torch.tensor((pixels.astype(np.float32) - 127.5) / 127.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(pixel_values=values, output_hidden_states=True)
    embedded = run(tower.encoder.embed, jnp.asarray(pixels))
    np.testing.assert_allclose(embedded, out.hidden_states[0].numpy(), atol=1e-5)
    final = run(tower.encoder.tokens, {"pixels": jnp.asarray(pixels)})
    np.testing.assert_allclose(final, out.last_hidden_state.numpy(), atol=1e-5)


def whisper(folder, positions=40):
    config = transformers.WhisperConfig(
        vocab_size=40,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=36,
        decoder_ffn_dim=36,
        max_source_positions=positions,
        max_target_positions=5,
        num_mel_bins=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = randomise(transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model.get_encoder()


WHISPER_SIZES = {
    "width": 24,
    "depth": 2,
    "heads": 4,
    "mlp_width": 36,
    "mel_bins": 16,
    "max_positions": 40,
}


def test_whisper_encoder_equals_pytorch_on_full_windows(tmp_path):
    reference = whisper(tmp_path)
    tower = imported({"encoder": "whisper", "overrides": WHISPER_SIZES}, tmp_path)
    mel = RNG.normal(size=(2, 80, 16)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(mel).permute(0, 2, 1)).last_hidden_state.numpy()
    whole = jnp.ones((2, 80), bool)
    got = run(lambda x: tower.encoder.tokens(x, whole)[0], jnp.asarray(mel))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_short_whisper_input_equals_a_pytorch_encoder_built_for_that_length(tmp_path):
    # The same weights behind a shorter window: what the reference would do if it took short input.
    reference = whisper(tmp_path)
    tower = imported({"encoder": "whisper", "overrides": WHISPER_SIZES}, tmp_path)
    mel = RNG.normal(size=(1, 80, 16)).astype(np.float32)
    reference.config.max_source_positions = 15
    reference.embed_positions.weight.data = reference.embed_positions.weight.data[:15]
    reference.embed_positions.num_embeddings = 15
    with torch.no_grad():
        short = torch.tensor(mel[:, :30]).permute(0, 2, 1)
        expected = reference(short).last_hidden_state.numpy()
    frames = jnp.arange(80)[None, :] < 30
    got = run(lambda x: tower.encoder.tokens(x, frames)[0], jnp.asarray(mel))
    np.testing.assert_allclose(got[:, :15], expected, atol=1e-5)


def test_whisper_hears_whole_windows_as_pytorch_does(tmp_path):
    """Waveform to features with `attend_padding`: extractor and encoder of transformers."""
    reference = whisper(tmp_path)
    overrides = WHISPER_SIZES | {"attend_padding": True}
    tower = imported({"encoder": "whisper", "overrides": overrides}, tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    extractor.n_samples, extractor.nb_max_frames = 80 * 160, 80
    wave = RNG.integers(-8000, 8000, (2, 80 * 160)).astype(np.int16)
    lengths = np.array([80 * 160, 5000], np.int32)
    clips = [wave[i, :n].astype(np.float32) / 32768 for i, n in enumerate(lengths)]
    mel = extractor(clips, sampling_rate=16000, return_tensors="np").input_features
    with torch.no_grad():
        hidden = reference(torch.tensor(mel)).last_hidden_state.numpy()
    expected = np.stack([hidden[0].mean(0), hidden[1, :16].mean(0)])  # ceil(5000 / 320) = 16
    got = run(tower.features, {"waveform": jnp.asarray(wave), "length": jnp.asarray(lengths)})
    # The two log-mel front ends differ by up to 3e-5 themselves.
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_flax_msgpack_files_are_read_as_safetensors_are(tmp_path):
    from flax import serialization, traverse_util

    from cwcl_jax.weights.readers import SafetensorsFile
    from cwcl_jax.weights.views import flax_names

    whisper(tmp_path)
    weights = flax_names(SafetensorsFile(tmp_path / "model.safetensors"))
    # What transformers' Flax classes wrote: nested names, Flax layouts.
    tree = {tuple(name.split("/")): np.array(weights.read(name)) for name in weights.entries}
    other = tmp_path / "flax"
    other.mkdir()
    content = serialization.msgpack_serialize(traverse_util.unflatten_dict(tree))
    (other / "flax_model.msgpack").write_bytes(content)
    config = {"encoder": "whisper", "overrides": WHISPER_SIZES}
    first, second = (split(imported(config, folder))[1] for folder in (tmp_path, other))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])
