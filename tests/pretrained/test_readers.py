"""Readers: every format gives the same arrays; bad files are errors that name the remedy."""

import dataclasses
import fnmatch
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, import_tower
from cwcl_jax.weights.locate import locate, sha256_of
from cwcl_jax.weights.readers import SafetensorsFile, open_weights, weights_file
from cwcl_jax.weights.writers import write_safetensors
from tests.models.builders import one_tower

BERT = {"vocab_size": 20, "max_tokens": 8, "width": 8, "depth": 1, "heads": 2, "mlp_width": 12}
ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.arange(3).astype(ml_dtypes.bfloat16),
    "scalar": np.asarray(2.5, np.float32),
}


def tower(weights, **overrides):
    config = TowerConfig("bert", overrides=BERT | overrides, weights=str(weights))
    _, leaves = one_tower(config, embed_dim=8)
    return config, {f"towers/text/{path}": leaf for path, leaf in leaves.items()}


def bert_arrays(depth=1, prefix=""):
    shapes = {
        "embeddings.word_embeddings.weight": (20, 8),
        "embeddings.position_embeddings.weight": (8, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"{layer}attention.{name}.weight": (8, 8)}
            shapes |= {f"{layer}attention.{name}.bias": (8,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (8,), f"{layer}{name}.bias": (8,)}
        shapes |= {
            f"{layer}intermediate.dense.weight": (12, 8),
            f"{layer}intermediate.dense.bias": (12,),
            f"{layer}output.dense.weight": (8, 12),
            f"{layer}output.dense.bias": (8,),
        }
    rng = np.random.default_rng(0)
    return {f"{prefix}{k}": rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def test_what_is_written_is_read_back_by_us_and_by_the_safetensors_library(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS, metadata={"format": "np"})
    file = SafetensorsFile(path)
    with safe_open(path, "np") as theirs:
        assert set(theirs.keys()) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert file.entries[name].shape == array.shape
            assert file.read(name).dtype == array.dtype
            np.testing.assert_array_equal(file.read(name), array)
            if name != "c":
                np.testing.assert_array_equal(theirs.get_tensor(name), array)
    assert file.metadata == {"format": "np"}


def test_all_formats_give_the_same_tower(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = bert_arrays()
    folders = [tmp_path / name for name in ("single", "sharded", "binary", "binary_sharded")]
    single, sharded, binary, binary_sharded = folders
    for folder in folders:
        folder.mkdir()
    write_safetensors(single / "model.safetensors", arrays)
    names = sorted(arrays)
    parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for part, members in parts.items():
        write_safetensors(sharded / part, {name: arrays[name] for name in members})
    index = {"weight_map": {name: part for part, members in parts.items() for name in members}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save(state, binary / "pytorch_model.bin")
    for part, members in parts.items():
        torch.save({name: state[name] for name in members}, binary_sharded / f"{part}.bin")
    index = {"weight_map": {n: f"{part}.bin" for part, members in parts.items() for n in members}}
    (binary_sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    results = [import_tower(c, "text", a) for c, a in map(tower, folders)]
    assert len({result.sha256 for result in results}) == 4
    for result in results[1:]:
        for path, leaf in results[0].leaves.items():
            np.testing.assert_array_equal(leaf, result.leaves[path])


def test_old_names_of_norms_are_read(tmp_path):
    arrays = bert_arrays(prefix="bert.")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in arrays.items()
    }
    write_safetensors(tmp_path / "x.safetensors", old)
    config, abstract = tower(tmp_path / "x.safetensors")
    leaves = import_tower(config, "text", abstract).leaves
    scale = leaves["towers/text/encoder/embedding_norm/scale"]
    np.testing.assert_array_equal(scale, arrays["bert.embeddings.LayerNorm.weight"])


def test_stacked_layers_are_filled_in_order(tmp_path):
    arrays = bert_arrays(depth=3)
    write_safetensors(tmp_path / "x.safetensors", arrays)
    overrides = BERT | {"depth": 3}
    path = str(tmp_path / "x.safetensors")
    config = TowerConfig("bert", overrides=overrides, weights=path, head="none", scan_layers=True)
    _, leaves = one_tower(config, embed_dim=8)
    abstract = {f"towers/text/{p}": leaf for p, leaf in leaves.items()}
    got = import_tower(config, "text", abstract).leaves["towers/text/encoder/blocks/mlp/up/kernel"]
    names = [f"encoder.layer.{i}.intermediate.dense.weight" for i in range(3)]
    np.testing.assert_array_equal(got, np.stack([arrays[name].T for name in names]))


@pytest.mark.parametrize("file_is_scanned", [False, True])
def test_own_exports_feed_scanned_and_unrolled_towers_alike(tmp_path, file_is_scanned, monkeypatch):
    config = TowerConfig("bert", overrides=BERT | {"depth": 3})
    stack = "encoder/blocks/"
    _, unrolled = one_tower(config)
    _, scanned = one_tower(dataclasses.replace(config, scan_layers=True))
    for path in scanned:
        if path.startswith(stack):
            tail = path.removeprefix(stack)
            scanned[path] = np.stack([unrolled[f"{stack}{i}/{tail}"] for i in range(3)])
        else:
            scanned[path] = unrolled[path]
    leaves = scanned if file_is_scanned else unrolled
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {f"towers/text/{path}": leaf for path, leaf in leaves.items()})
    reads = []
    read = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda s, name: reads.append(name) or read(s, name)
    )
    for expected in (scanned, unrolled):
        reads.clear()
        tree = {f"towers/text/{path}": leaf for path, leaf in expected.items()}
        result = import_tower(dataclasses.replace(config, weights=str(file)), "text", tree)
        assert not result.initialised
        for path, leaf in tree.items():
            np.testing.assert_array_equal(result.leaves[path], leaf)
        assert len(reads) == len(set(reads)) == len(leaves)  # each array of the file once


def test_an_answering_bert_is_a_bert(tmp_path):
    extra = {"qa_outputs.weight": np.zeros((2, 8), np.float32)}
    write_safetensors(tmp_path / "x.safetensors", bert_arrays(prefix="bert.") | extra)
    config, abstract = tower(tmp_path / "x.safetensors")
    assert import_tower(config, "text", abstract).ignored == ("qa_outputs/kernel",)


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "msgpack", "bin"])
def test_truncated_files_are_named_and_leave_nothing(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        write_safetensors(path, bert_arrays())
    elif suffix == "npz":
        np.savez(path, **bert_arrays())
    elif suffix == "msgpack":
        from flax import serialization

        path.write_bytes(serialization.msgpack_serialize(bert_arrays()))
    else:
        torch = pytest.importorskip("torch")
        torch.save({k: torch.tensor(v) for k, v in bert_arrays().items()}, path)
    content = path.read_bytes()
    for size in (len(content) // 2, 5, 0):
        path.write_bytes(content[:size])
        config, abstract = tower(path)
        placed = []
        with pytest.raises(ValueError, match=rf"model\.{suffix}.*(truncated|fetch|convert)"):
            import_tower(config, "text", abstract, put=lambda p, x, seen=placed: seen.append(p))
        assert not placed


def test_pickled_code_is_never_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    binary = tmp_path / "model.bin"
    binary.write_bytes(pickle.dumps({"embeddings.token_type_embeddings.weight": Payload()}))
    archive = tmp_path / "model.npz"
    with zipfile.ZipFile(archive, "w") as file:
        np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
        file.write(tmp_path / "x.npy", "embeddings.npy")
    pytest.importorskip("torch")
    for path, message in ((binary, "never executed"), (archive, "never loaded")):
        config, abstract = tower(path)
        with pytest.raises(ValueError, match=message):
            import_tower(config, "text", abstract)
    assert not (tmp_path / "executed").exists()


def test_another_architecture_is_recognised_and_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"conv1.weight": np.zeros((2, 2, 3), np.float32)})
    config, abstract = tower(path)
    with pytest.raises(
        WeightsMismatch, match=r"looks like a Whisper file.*'conv1.weight'.*whisper"
    ):
        import_tower(config, "text", abstract)
    write_safetensors(path, {"unet.weight": np.zeros(2, np.float32)})
    with pytest.raises(WeightsMismatch, match=r"no known kind of file.*'unet.weight'"):
        import_tower(config, "text", abstract)


def test_a_wrong_size_lists_what_differs(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, bert_arrays(depth=2))
    config, abstract = tower(path)
    with pytest.raises(WeightsMismatch) as caught:
        import_tower(config, "text", abstract)
    assert len(caught.value.unexpected) == 16
    assert all(".1." in name or "/1/" in name for name in caught.value.unexpected)
    config, abstract = tower(path, depth=3, width=4)
    with pytest.raises(WeightsMismatch, match="preset") as caught:
        import_tower(config, "text", abstract)
    assert any("(20, 8), expected (20, 4)" in entry for entry in caught.value.wrong)
    assert any("blocks/2/" in path for path in caught.value.missing)


def test_missing_shards_unknown_endings_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names the shard 1.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown kind of weights file '.h5'"):
        open_weights(tmp_path / "x.h5")


HUB_FILES = {"config.json", "1_Pooling/config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "weights", "opened"),
    [
        ("bert-base-uncased", {"model.safetensors", "pytorch_model.bin"}, "model.safetensors"),
        ("BAAI/bge-small-en-v1.5", {"pytorch_model.bin"}, "pytorch_model.bin"),
        ("owner/name@v1.0", {"flax_model.msgpack", "pytorch_model.bin"}, "flax_model.msgpack"),
        ("owner/name@refs/pr/1", {"tower.npz"}, "tower.npz"),
        (
            "owner/large",
            {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "optimizer.bin"},
            "pytorch_model.bin.index.json",
        ),
    ],
)
def test_hub_repositories_give_one_kind_of_weights(tmp_path, monkeypatch, name, weights, opened):
    import huggingface_hub

    def snapshot_download(repository, *, revision, allow_patterns):
        assert f"{repository}@{revision}".removesuffix("@None") == name
        for file in sorted(HUB_FILES | weights):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                content = {"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
                (tmp_path / file).write_text(json.dumps(content))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert weights_file(locate(name)).name == opened
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert fetched >= HUB_FILES
    assert "optimizer.bin" not in fetched
    if "model.safetensors" in weights:
        assert "pytorch_model.bin" not in fetched


def test_a_missing_file_is_no_hub_id(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    for name in ("owner/tower.npz", "model.safetensors", "./model", "/model"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            locate(name)


def test_hub_id_without_network_is_an_error_with_the_remedy(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"owner/name.*hub cannot give it.*its folder"):
        locate("owner/name")
    with pytest.raises(FileNotFoundError, match=r"'nothing_here' is not installed"):
        locate("installed:nothing_here/model")


def test_hash_is_that_of_the_bytes(tmp_path):
    import hashlib

    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
