"""wav2vec 2.0, HuBERT and WavLM compute what transformers' PyTorch classes compute, at 1e-5."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.models.relative import distance_buckets
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete
from tests.pretrained.against_torch import (
    close,
    imported,
    jitted,
    saved,
    torch,
    transformers,
    unit,
)

RNG = np.random.default_rng(0)
CONVS = {"conv_dim": (6, 10, 8), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)}
# Two shapes: a group norm, norms behind branches and an even kernel of positions; layer norms,
# norms before branches and an odd one.
GROUP = CONVS | {
    "feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False,
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
LAYER = CONVS | {
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 28,
    "num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
FAMILIES = {
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", {}),
    "hubert": ("HubertConfig", "HubertModel", {}),
    "wavlm": ("WavLMConfig", "WavLMModel", {"num_buckets": 16, "max_bucket_distance": 9}),
}
LENGTHS = (900, 611, 130)


def saved_pair(family, settings, folder, normalize):
    """A random model and its feature extractor, saved together."""
    config, kind, more = FAMILIES[family]
    # The seed of the test is the model's: weights of a convolution are drawn by the class.
    torch.manual_seed(0)
    config = getattr(transformers, config)(**settings, **more)
    model = saved(getattr(transformers, kind)(config), folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=normalize, return_attention_mask=settings["feat_extract_norm"] == "layer"
    )
    extractor.save_pretrained(folder)
    return model, extractor


def waves():
    """Recordings (int16) of several lengths, far from mean 0, and padded to one."""
    rows = [(3000 * RNG.normal(size=n) + 500).astype(np.int16) for n in LENGTHS]
    padded = np.stack([np.pad(row, (0, 1000 - len(row))) for row in rows])
    inputs = {"waveform": jnp.asarray(padded), "length": jnp.asarray(LENGTHS, jnp.int32)}
    return [row.astype(np.float32) / 32768 for row in rows], inputs


def outputs(tower, inputs):
    def run(inputs):
        samples, length = tower.encoder.samples(inputs)
        x, frames = tower.encoder.frames(samples, length)
        embedded = tower.encoder.embed(x, frames)
        tokens, real = tower.encoder.tokens(inputs)
        return {
            "samples": samples, "conv": x, "embedded": embedded, "tokens": tokens, "real": real,
            "features": tower.features(inputs), "embeds": tower(inputs),
        }  # fmt: skip

    return jitted(run, inputs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("settings", [GROUP, LAYER], ids=["group", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recordings_equal_pytorch_each_alone_whatever_is_padded(
    tmp_path, family, settings, normalize
):
    if normalize != (settings is LAYER) and family == "hubert":
        pytest.skip("the same code as wav2vec2's, which is tried with both")
    model, extractor = saved_pair(family, settings, tmp_path, normalize)
    tower, result = imported(family, tmp_path, settings["hidden_size"])
    assert result.ignored in ((), ("masked_spec_embed",))
    recordings, inputs = waves()
    ours = outputs(tower, inputs)
    for row, recording in enumerate(recordings):
        made = extractor(recording, sampling_rate=16000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            out = model(made, output_hidden_states=True)
        frames = out.last_hidden_state.shape[1]
        assert ours["real"][row].sum() == frames
        close(f"{family} samples", ours["samples"][row, : len(recording)], made[0])
        close(family, ours["embedded"][row, :frames], out.hidden_states[0][0])
        close(family, ours["tokens"][row, :frames], out.last_hidden_state[0])
        close(family, ours["features"][row], out.last_hidden_state[0].mean(0))
        close(family, ours["embeds"][row], unit(out.last_hidden_state[0].mean(0)))


# transformers' own call of PyTorch's attention.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_an_attention_mask_equals_pytorchs(tmp_path, family):
    model, extractor = saved_pair(family, LAYER, tmp_path, True)
    tower, _ = imported(family, tmp_path, LAYER["hidden_size"])
    recordings, inputs = waves()
    made = extractor(
        recordings, sampling_rate=16000, padding="max_length", max_length=1000, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(**made).last_hidden_state.numpy()
    ours = outputs(tower, inputs)
    close(f"{family} batch", ours["tokens"][ours["real"]], theirs[ours["real"]])


def test_older_and_newer_names_of_the_weight_normalisation_are_one(tmp_path):
    model, _ = saved_pair("wav2vec2", GROUP, tmp_path / "new", True)
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        state[f"wav2vec2.{name.replace('parametrizations.weight.original1', 'weight_v')}"] = tensor
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in state
    (tmp_path / "old").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "old" / name).write_text((tmp_path / "new" / name).read_text())
    # A class for a task has its own head beside the encoder.
    state["lm_head.weight"] = torch.zeros(5, 24)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    width = GROUP["hidden_size"]
    one, two = (imported("wav2vec2", tmp_path / name, width) for name in ("new", "old"))
    assert one[1].leaves.keys() == two[1].leaves.keys()
    for path, leaf in one[1].leaves.items():
        np.testing.assert_array_equal(leaf, two[1].leaves[path])
    assert "lm_head/kernel" in two[1].ignored


def test_a_recording_of_less_than_a_frame_has_one(tmp_path):
    model, _ = saved_pair("wav2vec2", GROUP, tmp_path, True)
    tower, _ = imported("wav2vec2", tmp_path, GROUP["hidden_size"])
    least = tower.encoder.config.least_samples
    lengths = torch.tensor([least - 1, least])
    assert model._get_feat_extract_output_lengths(lengths).tolist() == [0, 1]
    short = {"waveform": jnp.ones((1, least - 5), jnp.int16), "length": jnp.asarray([7])}
    features = jitted(tower.features, short)
    assert np.isfinite(features).all()


def test_what_no_shape_shows_is_compared_with_the_folder(tmp_path):
    saved_pair("wav2vec2", GROUP, tmp_path, True)
    for change, named in (
        ({"stable_norm": True}, "stable_norm=False"),
        ({"normalize_waveform": False}, "normalize_waveform=True"),
        ({"strides": (5, 2, 1)}, "strides="),
    ):
        with pytest.raises(WeightsMismatch, match=named):
            imported("wav2vec2", tmp_path, GROUP["hidden_size"], overrides=change)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"add_adapter": True}, "add_adapter=True is not supported"),
        ("config.json", {"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate is 8000"),
    ],
)
def test_parts_that_are_not_supported_are_refused_by_name(tmp_path, file, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    content = {"model_type": "hubert"} | change
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        complete(TowerConfig("hubert", weights=str(tmp_path)))


def test_masks_of_spectrograms_are_refused():
    with pytest.raises(ValueError, match="time_masks"):
        TowerConfig("wav2vec2", overrides={"time_masks": 2}).encoder_settings()


def test_distances_share_rows_as_pytorchs_do():
    config = transformers.WavLMConfig(num_hidden_layers=1, num_buckets=320)
    attention = transformers.models.wavlm.modeling_wavlm.WavLMAttention(16, 2)
    ahead = torch.arange(1500)[None] - torch.arange(1500)[:, None]
    theirs = attention._relative_positions_bucket(ahead).numpy()
    ours = distance_buckets(1500, config.num_buckets, config.max_bucket_distance)
    np.testing.assert_array_equal(ours, theirs)
