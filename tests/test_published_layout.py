"""The published layout: every tensor of the 7B model has a place, files of all kinds load, and saving back is exact."""

import json
from pathlib import Path

import pytest
import torch
from golden_files import golden, published_config, shapes_of_7b, write_published_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthus.configuration import OrthusConfig
from orthus.conversion import (
    NAME_TABLE,
    PUBLISHED_KEY_MAPPING,
    config_from_published,
    config_to_published,
    is_published,
    our_name,
    published_name,
    read_tensor_shapes,
    save_published,
)
from orthus.modeling import OrthusForConditionalGeneration

QUANTIZER = "model.vqmodel.quantize.embedding.weight"
SIZES_OF_7B = {
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vq_config": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_holds(model: OrthusForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """The model has exactly these published tensors, bit for bit."""
    state = model.state_dict()
    assert set(state) == {our_name(name) for name in tensors}
    assert all(torch.equal(state[our_name(name)], value) for name, value in tensors.items())


def write(folder: Path, files: dict[str, dict[str, Tensor]], config: dict | None = None) -> Path:
    """A published checkpoint of these weight files, sharded if there are several."""
    (folder / "config.json").write_text(json.dumps(config or published_config()))
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---------------------------------------------------------------------- names


def test_the_7b_layout_has_a_place_for_every_tensor() -> None:
    shapes = shapes_of_7b()
    config = OrthusConfig.from_dict(config_from_published({**published_config(), **SIZES_OF_7B}, shapes))
    with torch.device("meta"):
        model = OrthusForConditionalGeneration(config)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 749
    assert ours == {our_name(name): shape for name, shape in shapes.items()}  # nothing missing, nothing unexpected
    assert sum(value.numel() for value in model.state_dict().values()) == 7_134_462_595


def test_the_name_table_reads_the_same_in_both_directions() -> None:
    names = list(shapes_of_7b())
    assert [published_name(our_name(name)) for name in names] == names
    assert len({our_name(name) for name in names}) == len(names) and len(PUBLISHED_KEY_MAPPING) == len(NAME_TABLE)
    assert our_name("module.model.norm.weight") == "backbone.norm.weight"
    with pytest.raises(ValueError, match="no tensor of the published layout"):
        our_name("model.adapter.weight")
    with pytest.raises(ValueError, match="no place for 'latent_embedding.positions'"):
        published_name("latent_embedding.positions")


# ---------------------------------------------------------------------- config


def test_config_is_read_off_config_and_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    raw = published_config()
    shapes = read_tensor_shapes(folder)
    assert is_published(raw) and raw["bos_token_id"] == raw["pad_token_id"] == 1  # the trap: bos must be 0
    assert shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    config = OrthusConfig.from_dict(config_from_published(raw, shapes))
    ids = {name: getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos", "boi", "eoi", "image", "separator")}
    assert ids == {"bos": 0, "pad": 1, "eos": 2, "boi": 8197, "eoi": 8196, "image": 8711, "separator": 8710}
    assert (config.text_config.bos_token_id, config.text_config.rms_norm_eps) == (0, 1e-5)
    assert (config.num_codes, config.code_offset, config.num_latents) == (8192, 4, 1024)
    assert config.vocabulary_map == raw["vocabulary_map"]
    head = config.head_config
    assert (head.latent_dim, head.cond_dim, head.width, head.num_blocks, head.time_embed_dim) == (256, 64, 64, 3, 256)
    assert (head.objective, head.latent_scale) == ("v_prediction", 0.1)
    assert config.autoencoder_config.num_embeddings == 0  # this checkpoint lacks the quantiser's codebook


def test_head_of_any_size_and_codebook_of_any_width() -> None:
    shapes = shapes_of_7b()
    shapes = {name: shape for name, shape in shapes.items() if "res_blocks.2." not in name and name != QUANTIZER}
    shapes["mlp_head.input_proj.weight"] = (96, 256)
    config = config_from_published({**published_config(), **SIZES_OF_7B}, shapes)
    assert (config["head_config"]["width"], config["head_config"]["num_blocks"]) == (96, 2)
    assert config["autoencoder_config"]["num_embeddings"] == 0


def test_a_broken_vocabulary_map_is_refused(folder: Path) -> None:
    shapes = read_tensor_shapes(folder)
    for token, message in (("<reserved08706>", "lacks <reserved08706>"), ("IMGIMGDZ", "not consecutive")):
        raw = published_config()
        del raw["vocabulary_map"][token]
        with pytest.raises(ValueError, match=message):
            config_from_published(raw, shapes)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="convert its weights to safetensors"):
        read_tensor_shapes(tmp_path)


# ---------------------------------------------------------------------- loading


def test_plain_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    model, report = OrthusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert_holds(model, tensors)


def test_shards_prefixes_and_old_buffers(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Three fp32 shards of a wrapped model, with rotary buffers of old versions and the quantiser's codebook."""
    complete = {**tensors, QUANTIZER: torch.randn(8192, 256).bfloat16()}
    names = sorted(complete)
    shards = {
        f"model-0000{index + 1}-of-00003.safetensors": {"module." + name: complete[name].float() for name in names[index::3]}
        for index in range(3)
    }
    shards["model-00001-of-00003.safetensors"]["module.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model, report = OrthusForConditionalGeneration.from_pretrained(
        write(tmp_path, shards), output_loading_info=True, dtype=torch.bfloat16, device_map="cpu"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.autoencoder.quantizer_codebook.shape == (8192, 256)
    assert_holds(model, complete)


def test_chameleon_without_head_is_a_base_to_train_from(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Only when asked for: absent tensors start from random values."""
    absent = ("mlp_head.", "model.codebook_in.", "model.vqmodel.decoder.")
    kept = {name: value for name, value in tensors.items() if not name.startswith(absent)}
    write(tmp_path, {"model.safetensors": kept})
    with pytest.raises(ValueError, match="lacks"):
        OrthusForConditionalGeneration.from_pretrained(tmp_path)
    model = OrthusForConditionalGeneration.from_pretrained(tmp_path, allow_missing=True, dtype=torch.float32)
    assert model.config.head_config.width == 1536
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    head = model.diffusion_head
    assert not head.final_linear.weight.any() and not head.blocks[0].modulation.weight.any()  # a new head starts as identity
    assert torch.equal(model.backbone.norm.weight, tensors["model.norm.weight"].float())


# ---------------------------------------------------------------------- saving


def test_saving_in_our_layout_and_loading_again(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = OrthusForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again, report = OrthusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_holds(again, tensors)


def test_saving_back_is_bit_exact(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    complete = {**tensors, QUANTIZER: torch.randn(8192, 256).bfloat16()}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save_published(OrthusForConditionalGeneration.from_pretrained(write(source, {"model.safetensors": complete})), target, "4MB")
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 1
    saved = {name: value for file in files for name, value in load_file(file).items()}
    assert set(saved) == set(complete)
    assert all(saved[name].dtype == value.dtype and torch.equal(saved[name], value) for name, value in complete.items())
    old, new = published_config(), json.loads((target / "config.json").read_text())
    unchanged = set(old) - {"bos_token_id", "vq_config", "transformers_version"}
    assert {key: new[key] for key in unchanged} == {key: old[key] for key in unchanged}
    assert new["bos_token_id"] == 0
    assert all(new["vq_config"][key] == old["vq_config"][key] for key in ("base_channels", "channel_multiplier", "resolution"))
    assert_holds(OrthusForConditionalGeneration.from_pretrained(target), complete)


def test_what_the_published_layout_cannot_hold_is_refused(model: OrthusForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_config.model_type='llama'"):
        save_published(model, tmp_path)
    fields = config_from_published(published_config(), {})
    fields["head_config"] |= {"objective": "flow_matching"}
    with pytest.raises(ValueError, match="flow_matching"):
        config_to_published(OrthusConfig.from_dict(fields).to_dict())


def test_goldens_are_small() -> None:
    """They travel with the repository."""
    folder = Path(__file__).parent / "goldens"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert golden("07_decode")["pixel_values"].shape == (1, 3, 32, 32)
