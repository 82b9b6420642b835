"""Options of `from_pretrained`: which weights quantisation takes and what it costs, where a device map may put them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import write_published_folder
from test_adapters import base_model
from test_modeling import packed_and_padded
from torch import nn
from transformers import AutoModelForImageTextToText

from orthus.adapters import is_quantized, quantization
from orthus.loading import HEADS
from orthus.modeling import OrthusForConditionalGeneration

pytest.importorskip("torchao")
pytest.importorskip("accelerate")
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

PROMPT = {"input_ids": torch.tensor([[0, 10, 11, 6]]), "modality": "image"}
RESIDENT = (*HEADS, "backbone.embed_tokens", "backbone.norm", "backbone.rotary_emb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    base_model().save_pretrained(path)
    return path


def load(folder: Path, **options: Any) -> OrthusForConditionalGeneration:
    return OrthusForConditionalGeneration.from_pretrained(folder, **options)


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if is_quantized(parameter)}


# -- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group", "half_range"), [("int8", None, 127.5), ("int4", 32, 7.5)])
def test_only_linear_weights_of_the_backbone_are_quantised(folder: Path, kind: str, group: int | None, half_range: float) -> None:
    """To the nearest of 256 or 16 steps that span the largest value of the row or group, so within half a step."""
    plain, model = load(folder), load(folder, quantization_config=quantization(kind))
    linears = {f"backbone.{name}.weight" for name, module in plain.backbone.named_modules() if isinstance(module, nn.Linear)}
    assert quantized_names(model) == linears
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name not in linears)
    for name in linears:
        weight = state[name].unflatten(1, (-1, group or state[name].shape[1]))
        error = (model.get_parameter(name).dequantize().view_as(weight) - weight).abs()
        assert (error <= 0.501 * weight.abs().amax(-1, keepdim=True) / half_range).all() and error.any()
    assert model.generate(**PROMPT).image_latents[0].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_are_saved_as_they_are(folder: Path, tmp_path: Path, kind: str) -> None:
    model = load(folder, quantization_config=quantization(kind))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert quantized_names(loaded) == quantized_names(model)
    batch, _ = packed_and_padded()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_a_config_may_say_itself_what_to_leave_alone(folder: Path) -> None:
    given = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["backbone.layers.0", "autoencoder", "lm_head"])
    names = quantized_names(load(folder, quantization_config=given))
    assert {name.split(".")[0] for name in names} == {"backbone", "diffusion_head"}
    assert not any(name.startswith("backbone.layers.0.") for name in names)
    as_dict = TorchAoConfig(Int8WeightOnlyConfig()).to_dict()
    assert {name.split(".")[0] for name in quantized_names(load(folder, quantization_config=as_dict))} == {"backbone"}
    shared = TorchAoConfig(Int8WeightOnlyConfig())
    load(folder, quantization_config=shared)
    assert shared.modules_to_not_convert is None  # the caller's object stays as it was


def test_the_published_layout_can_be_quantised_on_the_way_in(tmp_path: Path) -> None:
    model = load(write_published_folder(tmp_path), quantization_config=quantization("int8"))
    assert {name.split(".")[0] for name in quantized_names(model)} == {"backbone"}
    assert model(input_ids=torch.tensor([[0, 100, 8710]])).logits.isfinite().all()


def test_what_cannot_be_quantised_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="soft VQ reads rows of the embeddings"):
        load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True))
    with pytest.raises(ValueError, match="'int3' is not one of int8, int4"):
        quantization("int3")


@pytest.mark.gpu
def test_packed_int4_on_a_gpu(tmp_path: Path) -> None:
    """torchao has no packed int4 kernel for CPUs outside of its prototypes; this one computes in bf16."""
    base_model(hidden_size=128, intermediate_size=256).to(torch.bfloat16).save_pretrained(tmp_path)
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    plain, model = (load(tmp_path, device_map={"": "cuda"}, **options) for options in ({}, {"quantization_config": config}))
    assert {name.split(".")[0] for name in quantized_names(model)} == {"backbone"}
    ids = torch.tensor([[0, 10, 11, 6]], device="cuda")
    expected, found = (m(input_ids=ids).last_hidden_state.float() for m in (plain, model))
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


# -- placement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(folder: Path, device_map: Any) -> None:
    batch, _ = packed_and_padded()
    expected = load(folder)(**batch).logits
    torch.testing.assert_close(load(folder, device_map=device_map)(**batch).logits, expected, rtol=0, atol=0)


def test_layers_of_the_backbone_can_stay_on_the_disk(folder: Path, tmp_path: Path) -> None:
    batch, _ = packed_and_padded()
    noise, plain = torch.randn(1, 1, 4, 3), load(folder)
    device_map = {**dict.fromkeys(RESIDENT, "cpu"), "backbone.layers.0": "cpu", "backbone.layers.1": "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert {name for name, p in model.named_parameters() if p.is_meta} == {
        name for name, _ in plain.named_parameters() if name.startswith("backbone.layers.1.")
    }
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=0)
    expected, found = (m.generate(**PROMPT, noise=noise).pixel_values[0] for m in (plain, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_map_that_offloads_what_is_read_directly_is_refused(folder: Path, tmp_path: Path) -> None:
    device_map = {**dict.fromkeys(RESIDENT, "cpu"), "backbone.layers": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"offloads lm_head; .*'backbone.layers': 'disk'"):
        load(folder, device_map=device_map, offload_folder=tmp_path)
    size = sum(parameter.nbytes for parameter in load(folder).parameters())
    with pytest.raises(ValueError, match="only layers of the backbone can be offloaded"):
        load(folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path)


def test_accelerate_knows_what_not_to_split(folder: Path) -> None:
    """The layers of any backbone are found through the backbone itself."""
    assert {"LlamaDecoderLayer", "DiffusionHead"} <= set(load(folder)._no_split_modules)
    assert "Qwen2DecoderLayer" in base_model("qwen2")._no_split_modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_every_weight_takes_the_dtype(folder: Path, dtype: Any) -> None:
    model = load(folder, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
