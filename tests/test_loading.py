"""Loading: incomplete, misshaped, damaged and unsafe weights are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthus.modeling import OrthusForConditionalGeneration


@pytest.fixture
def folder(model: OrthusForConditionalGeneration, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("diffusion_head.cond_embed.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: diffusion_head\.cond_embed\.weight"):
        OrthusForConditionalGeneration.from_pretrained(folder)
    OrthusForConditionalGeneration.from_pretrained(folder, allow_missing=True)


def test_misshaped_tensors_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"latent_embedding.codebook": torch.zeros(5, 3)}))
    with pytest.raises(ValueError, match="latent_embedding.codebook"):
        OrthusForConditionalGeneration.from_pretrained(folder)


def test_damaged_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        OrthusForConditionalGeneration.from_pretrained(folder)


def test_a_missing_weight_file_is_named(model: OrthusForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ weight files: {gone.name}"):
        OrthusForConditionalGeneration.from_pretrained(tmp_path)


def test_pickles_are_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "weights.hidden")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle can run code"):
        OrthusForConditionalGeneration.from_pretrained(folder)


def test_pickle_with_a_safetensors_name_is_refused(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        OrthusForConditionalGeneration.from_pretrained(folder)


def test_unknown_config_key_is_refused_with_a_suggestion(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["image_loss_wieght"] = 3.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="image_loss_weight"):
        OrthusForConditionalGeneration.from_pretrained(folder)
