"""Autoencoders of diffusers and timm: they compute what their libraries compute, save exactly, and load from any folder."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from golden_files import write_published_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import AutoModel, ChameleonConfig, ChameleonForConditionalGeneration

from orthus.autoencoder import Autoencoder, CalibratedAutoencoder, PatchAutoencoder, PatchAutoencoderConfig, VQGANAutoencoder
from orthus.autoencoder_loading import load_autoencoder
from orthus.foreign_autoencoders import (
    DiffusersAutoencoder,
    DiffusersAutoencoderConfig,
    RepresentationAutoencoder,
    RepresentationAutoencoderConfig,
)
from orthus.modeling import OrthusForConditionalGeneration
from train import autoencoder as stage

diffusers = pytest.importorskip("diffusers")
timm = pytest.importorskip("timm")

ROOT = Path(__file__).parent.parent
KL = {
    "block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3, "mid_block_add_attention": False, "sample_size": 16,
}  # fmt: skip
DC = {
    "latent_channels": 8, "attention_head_dim": 8, "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_block_out_channels": [16, 32],
    "decoder_block_out_channels": [16, 32], "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], [3]], "decoder_qkv_multiscales": [[], [3]],
}  # fmt: skip
VIT = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 32, "num_decoder_layers": 2, "num_decoder_heads": 2}


def jitter(model: nn.Module) -> nn.Module:
    """Move every parameter, so that none has its initial value (zero biases, layer scales) by which it could go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def kl(image_size: int = 16, merge: int = 1, **changes: Any) -> DiffusersAutoencoder:
    torch.manual_seed(0)
    config = DiffusersAutoencoderConfig(network_config={**KL, **changes}, image_size=image_size, merge=merge)
    return jitter(DiffusersAutoencoder(config))


def dc(image_size: int = 16, merge: int = 1) -> DiffusersAutoencoder:
    torch.manual_seed(0)
    fields = {"network_class": "AutoencoderDC", "network_config": DC, "image_size": image_size, "merge": merge}
    return jitter(DiffusersAutoencoder(DiffusersAutoencoderConfig(**fields)))


def representation(name: str = "vit_tiny_patch16_224", patch_size: int = 16, **changes: Any) -> RepresentationAutoencoder:
    torch.manual_seed(0)
    kwargs = {**VIT, **changes.pop("encoder_kwargs", {})}
    config = RepresentationAutoencoderConfig(
        encoder_name=name, encoder_kwargs=kwargs, image_size=kwargs["img_size"], patch_size=patch_size,
        latent_dim=kwargs["embed_dim"], **{**DECODER, **changes},
    )  # fmt: skip
    return jitter(RepresentationAutoencoder(config))


def rotary() -> RepresentationAutoencoder:
    """An encoder with buffers that are not in its state dict: the tables of its rotary positions and more."""
    return representation("eva02_tiny_patch14_224", 14, encoder_kwargs={"img_size": 56})


def pictures(autoencoder: Autoencoder, num: int = 4) -> Tensor:
    size = autoencoder.config.image_size
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


ALL = pytest.mark.parametrize(
    "make", [kl, lambda: kl(merge=4), dc, lambda: dc(merge=2), representation, rotary], ids="kl kl4 dc dc2 vit rotary".split()
)

# ---------------------------------------------------------------------- one interface


@ALL
def test_interface_and_exact_saving(make: Any, tmp_path: Path) -> None:
    autoencoder = make()
    config, x = autoencoder.config, pictures(autoencoder)
    autoencoder.calibrate(x)
    latents, pixels = autoencoder.encode(x), autoencoder.decode(autoencoder.encode(x))
    assert latents.shape == (4, config.num_latents, config.latent_dim) and pixels.shape == x.shape
    assert autoencoder.latent_mean.shape == (config.latent_dim,) and (autoencoder.latent_std != 1).all()
    with pytest.raises(ValueError, match="resize and crop with the processor"):
        autoencoder.encode(x[..., 1:])
    with pytest.raises(ValueError, match="whole images only"):
        autoencoder.decode(latents[..., 1:])
    autoencoder.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(autoencoder) and again.config.to_diff_dict() == config.to_diff_dict()
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again.encode(x), latents) and torch.equal(again.decode(latents), pixels)


@ALL
def test_bfloat16_keeps_latents_sane(make: Any, tmp_path: Path) -> None:
    autoencoder = make()
    x = pictures(autoencoder)
    autoencoder.calibrate(x)
    autoencoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    latents = again.encode(x)
    assert latents.dtype == torch.bfloat16
    error = latents.float() - autoencoder.encode(x)
    assert error.square().mean().sqrt() < 0.1  # of latents with standard deviation 1
    assert again.decode(latents).isfinite().all()


@ALL
def test_calibrated_latents_have_zero_mean_and_unit_variance(make: Any) -> None:
    autoencoder = make()
    x = pictures(autoencoder, 70)  # more than are encoded at once
    x[0] *= 0.1
    before = autoencoder.decode(autoencoder.encode(x))
    for _ in range(2):  # calibrating again changes nothing
        autoencoder.calibrate(x)
        latents = autoencoder.encode(x).flatten(0, 1)
        torch.testing.assert_close(latents.mean(0), torch.zeros(latents.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std(0), torch.ones(latents.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), before, atol=1e-4, rtol=1e-4)


@ALL
def test_it_is_the_image_side_of_an_orthus(make: Any, tmp_path: Path) -> None:
    autoencoder = make()
    fields = autoencoder.config.to_dict()
    length = autoencoder.config.num_latents
    text_config = tiny_model().config.text_config
    text_config.max_position_embeddings = length + 16
    model = tiny_model(autoencoder_config=fields, head={"latent_dim": autoencoder.config.latent_dim}, text_config=text_config)
    x = pictures(autoencoder, 1)
    model.autoencoder.calibrate(pictures(autoencoder))
    ids = torch.tensor([[0, 10, 6, 4, *[7] * length, 5, 6]])
    labels = ids.masked_fill(ids != 7, -100)
    draws = {"timesteps": torch.arange(length), "noise": torch.randn(length, autoencoder.config.latent_dim)}
    output = model(ids, pixel_values=x, labels=labels, **draws)
    same = model(ids, image_latents=model.get_image_latents(x), labels=labels, **draws)
    assert output.loss_counts["image"] == length and torch.equal(output.loss, same.loss) and output.loss.isfinite()
    assert model.decode_image_latents(model.get_image_latents(x)).shape == x.shape
    model.save_pretrained(tmp_path)
    again = OrthusForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again.autoencoder) is type(autoencoder)
    assert torch.equal(again.get_image_latents(x), model.get_image_latents(x))
    alone = load_autoencoder(tmp_path)  # the part of the whole
    assert torch.equal(alone.encode(x), model.get_image_latents(x))
    assert torch.equal(alone.decode(alone.encode(x)), model.decode_image_latents(model.get_image_latents(x)))


# ---------------------------------------------------------------------- what the libraries compute


@pytest.mark.parametrize("make", [kl, dc])
def test_diffusers_agrees_with_the_library(make: Any) -> None:
    autoencoder = make()
    config, x = autoencoder.config, pictures(autoencoder)
    network = getattr(diffusers, config.network_class)(**config.network_config).eval()
    network.load_state_dict(
        {name.removeprefix("network."): v for name, v in autoencoder.state_dict().items() if "network" in name}
    )
    output = network.encode(x)
    features = output.latent_dist.mean if config.network_class == "AutoencoderKL" else output.latent
    assert torch.equal(autoencoder.encode(x), features.flatten(2).transpose(1, 2))
    assert torch.equal(autoencoder.decode(autoencoder.encode(x)), network.decode(features).sample)
    assert config.downsampling == x.shape[-1] // features.shape[-1]


@pytest.mark.parametrize("make", [kl, dc])
def test_merging_is_pixel_unshuffle_and_loses_nothing(make: Any) -> None:
    plain, merged = make(), make(merge=4)
    x = pictures(plain)
    size = plain.config.image_size // plain.config.downsampling
    features = plain.encode(x).transpose(1, 2).unflatten(2, (size, size))
    expected = nn.PixelUnshuffle(4)(features).flatten(2).transpose(1, 2)
    assert merged.config.num_latents == plain.config.num_latents // 16 and merged.config.latent_dim == 16 * features.shape[1]
    assert torch.equal(merged.encode(x), expected)
    assert torch.equal(merged.decode(expected), plain.decode(plain.encode(x)))


@pytest.mark.parametrize("make", [kl, dc])
def test_diffusers_latents_are_in_raster_order(make: Any) -> None:
    autoencoder = make(32, merge=4)  # 4 x 4 latents of 8 x 8 pixels
    x = torch.zeros(1, 3, 32, 32)
    bright = x.clone()
    bright[..., 8:16, 16:24] = 1.0  # row 1, column 2: raster index 6
    latents = autoencoder.encode(x)
    assert int((autoencoder.encode(bright) - latents).square().sum(-1).argmax()) == 6
    changed = latents.clone()
    changed[:, 6] += 3.0
    effect = (autoencoder.decode(changed) - autoencoder.decode(latents)).square().sum(1, keepdim=True)
    assert int(nn.functional.avg_pool2d(effect, 8).argmax()) == 6


@pytest.mark.parametrize("tokens", [{}, {"reg_tokens": 3}], ids=["class", "registers"])
def test_representation_agrees_with_the_library(tokens: dict) -> None:
    autoencoder = representation(encoder_kwargs=tokens, pixel_mean=[0.1, 0.4, 0.5], pixel_std=[0.2, 0.3, 0.6])
    x = pictures(autoencoder)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT, **tokens).eval()
    encoder.load_state_dict(autoencoder.encoder.state_dict())
    with torch.no_grad():
        found = encoder.forward_features(normalize((x + 1) / 2, [0.1, 0.4, 0.5], [0.2, 0.3, 0.6]))
    assert found.shape == (4, 16 + 1 + len(tokens) * 3, 32)
    torch.testing.assert_close(autoencoder.encode(x), found[:, -16:])


def test_representation_latents_are_in_raster_order() -> None:
    """Without attention on either side, a latent belongs to one patch of pixels."""
    autoencoder = representation(encoder_kwargs={"depth": 0})
    autoencoder.decoder.blocks = nn.Identity()
    x = pictures(autoencoder, 1)
    changed = x.clone()
    changed[..., 16:32, 32:48] += 0.5  # row 1, column 2 of 4 x 4 patches: raster index 6
    latents, other = autoencoder.encode(x), autoencoder.encode(changed)
    assert (latents != other).any(-1)[0].nonzero().flatten().tolist() == [6]
    pixels = (autoencoder.decode(latents) != autoencoder.decode(other)).any(1)[0]
    outside = pixels.clone()
    outside[16:32, 32:48] = False
    assert pixels.any() and not outside.any()


# ---------------------------------------------------------------------- training a decoder


def test_only_the_decoder_learns(tmp_path: Path) -> None:
    representation(latent_noise=0.3).save_pretrained(tmp_path)
    for autoencoder in (representation(latent_noise=0.3), RepresentationAutoencoder.from_pretrained(tmp_path)):
        autoencoder.train()
        assert autoencoder.decoder.training and not any(module.training for module in autoencoder.encoder.modules())
        x = pictures(autoencoder)
        assert not torch.equal(autoencoder(x).pixel_values, autoencoder(x).pixel_values)  # latent noise
        output = autoencoder(x)
        assert not output.latents.requires_grad
        output.loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in autoencoder.encoder.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in autoencoder.decoder.parameters())
        autoencoder.requires_grad_(True)  # even so
        autoencoder(x).loss.backward()
        assert all(p.grad is None for p in autoencoder.encoder.parameters())


def test_a_new_one_starts_as_its_library_and_a_usual_transformer_do() -> None:
    config = representation().config
    torch.manual_seed(5)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    torch.manual_seed(5)
    autoencoder = RepresentationAutoencoder(config)
    for name, value in encoder.state_dict().items():
        assert torch.equal(autoencoder.encoder.state_dict()[name], value), name
    assert 0.015 < autoencoder.decoder.positions.std() < 0.025
    assert autoencoder.decoder.blocks[0].attn.qkv.bias.abs().sum() == 0
    torch.manual_seed(5)
    network = diffusers.AutoencoderKL(**KL)
    torch.manual_seed(5)
    wrapped = DiffusersAutoencoder(DiffusersAutoencoderConfig(network_config=KL)).network
    assert all(torch.equal(wrapped.state_dict()[name], value) for name, value in network.state_dict().items())


def test_loss_falls_in_20_steps() -> None:
    autoencoder = representation().train()
    smooth = nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=64)
    kept = {name: value.clone() for name, value in autoencoder.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in autoencoder.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        output = autoencoder(smooth)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], losses
    assert all(torch.equal(value, kept[name]) for name, value in autoencoder.encoder.state_dict().items())


def run_stage(folder: Path, *overrides: str) -> Autoencoder:
    fixed = ["run.num_steps=3", "batch_size=4", f"run.output_dir={folder}", "optim.peak_lr=1e-2"]
    stage.main([str(ROOT / "configs" / "small" / "autoencoder.yaml"), *fixed, *overrides])
    return load_autoencoder(folder / "final")


@pytest.mark.parametrize(("make", "frozen"), [(representation, "encoder"), (lambda: kl(merge=2), "network.encoder")])
def test_train_goes_on_from_any_autoencoder(make: Any, frozen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Tensor] = []  # calibration that training starts with
    fit = stage.fit
    monkeypatch.setattr(stage, "fit", lambda model, *a, **k: (before.append(model.latent_std.clone()), fit(model, *a, **k)))
    first = make()
    first.save_pretrained(tmp_path / "start")
    trained = run_stage(
        tmp_path / "run", f"start={tmp_path / 'start'}", f"frozen=[{frozen}]", "model={latent_noise: 0.1}", "world.image_size=64"
    )
    assert isinstance(trained, CalibratedAutoencoder) and (trained.latent_std != 1).all()
    assert torch.equal(trained.latent_std, before[0])
    assert trained.config.image_size == 64 and trained.config.latent_noise == 0.1
    after = trained.state_dict()
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, after[name])}
    assert not any(name.startswith(frozen) for name in changed)
    assert any("decoder" in name for name in changed)
    with pytest.raises(ValueError, match="no such part"):
        run_stage(tmp_path / "other", f"start={tmp_path / 'start'}", "frozen=[encodr]", "model={}", "world.image_size=64")


def test_train_makes_a_patch_autoencoder_by_default(tmp_path: Path) -> None:
    trained = run_stage(tmp_path, "model.hidden_dim=16", "frozen=[encoder]")
    assert isinstance(trained, PatchAutoencoder) and (trained.latent_std != 1).all()


# ---------------------------------------------------------------------- loading


MISLEADING = "timm-chameleon-vae"  # what a path says does not matter


@ALL
def test_load_ours(make: Any, tmp_path: Path) -> None:
    autoencoder = make()
    autoencoder.calibrate(pictures(autoencoder))
    autoencoder.save_pretrained(tmp_path / MISLEADING)
    again = load_autoencoder(tmp_path / MISLEADING, latent_noise=0.25)
    assert not again.training and again.config.latent_noise == 0.25
    assert torch.equal(again.encode(pictures(again)), autoencoder.encode(pictures(again)))
    other = 2 * autoencoder.config.image_size
    if isinstance(autoencoder, DiffusersAutoencoder):
        larger = load_autoencoder(str(tmp_path / MISLEADING), other, dtype=torch.bfloat16)
        assert larger.encode(pictures(larger)).shape == (4, 4 * again.config.num_latents, again.config.latent_dim)
        assert larger.dtype == torch.bfloat16
    else:
        with pytest.raises(ValueError, match=f"image_size={other}, but .* pictures of {other // 2} pixels; leave"):
            load_autoencoder(tmp_path / MISLEADING, other)


def test_load_the_shipped_checkpoint() -> None:
    folder = ROOT / "checkpoints" / "orthus-small"
    whole, part = OrthusForConditionalGeneration.from_pretrained(folder), load_autoencoder(folder)
    assert isinstance(part, PatchAutoencoder) and part.config.to_diff_dict() == whole.autoencoder.config.to_diff_dict()
    assert torch.equal(part.encode(pictures(part)), whole.get_image_latents(pictures(part)))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_the_autoencoder_of_a_published_checkpoint_without_the_other_shards(prefix: str, tmp_path: Path) -> None:
    tensors = load_file(write_published_folder(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {"a": {}, "b": {}, "gone": {}}
    for index, (name, value) in enumerate(sorted(tensors.items())):
        parts["gone" if "vqmodel" not in name else "ab"[index % 2]][prefix + name] = value
    quantizer = torch.randn(8192, 256, dtype=torch.bfloat16)
    parts["a"][f"{prefix}model.vqmodel.quantize.embedding.weight"] = quantizer
    for file in ("a", "b"):
        save_file(parts[file], tmp_path / f"{file}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    part = load_autoencoder(tmp_path)
    assert isinstance(part, VQGANAutoencoder) and part.dtype == torch.bfloat16
    assert torch.equal(part.quantizer_codebook, quantizer)
    state = part.state_dict()
    for name in ("encoder.conv_in.weight", "decoder.conv_out.bias", "post_quant_conv.weight"):
        assert torch.equal(state[name], tensors[f"model.vqmodel.{name}"])
    assert len(state) == sum("vqmodel" in name for name in tensors) + 1
    with pytest.raises(ValueError, match="image_size=256, but .* pictures of 128 pixels"):
        load_autoencoder(tmp_path, 256)


def chameleon(folder: Path) -> ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    vq = {"resolution": 16, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "embed_dim": 6}
    vq |= {"latent_channels": 8, "num_embeddings": 5}
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {"<image>": 8, **{f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDE")}}
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(**sizes, num_key_value_heads=2, vq_config=vq, vocabulary_map=vocabulary)
    )
    model.save_pretrained(folder)
    return model.eval()


def test_load_a_plain_chameleon_says_that_it_cannot_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vqmodel = chameleon(tmp_path).model.vqmodel
    with caplog.at_level(logging.WARNING, "orthus"):
        part = load_autoencoder(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("orthus")]
    assert len(said) == 1 and "no image decoder" in said[0] and "tensors of decoder" in said[0]
    x = pictures(part)
    expected = vqmodel.quant_conv(vqmodel.encoder(x)).flatten(2).transpose(1, 2)
    assert torch.equal(part.encode(x), expected)
    assert part.decode(expected).isfinite().all()
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.vqmodel.encoder.conv_in.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the autoencoder, such as encoder\.conv_in\.weight"):
        load_autoencoder(tmp_path)


def test_load_a_diffusers_folder(tmp_path: Path) -> None:
    autoencoder = kl()
    autoencoder.network.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    again = load_autoencoder(tmp_path, subfolder="vae")
    x = pictures(again)
    assert isinstance(again, DiffusersAutoencoder) and again.config.image_size == 16 and not again.training
    assert torch.equal(again.encode(x), autoencoder.encode(x))
    merged = load_autoencoder(tmp_path / "vae", 64, merge=2, dtype=torch.bfloat16, latent_noise=0.5)
    assert (merged.config.num_latents, merged.config.latent_dim, merged.config.latent_noise) == (16 * 16, 12, 0.5)
    assert merged.dtype == merged.latent_mean.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="diffusers pipeline: pass subfolder='vae'"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="image_size=31 is not a multiple"):
        load_autoencoder(tmp_path / "vae", 31)
    with pytest.raises(ValueError, match="unknown key 'mergee'.*merge"):
        load_autoencoder(tmp_path / "vae", mergee=2)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* decoder\.conv_in\.weight"):
        load_autoencoder(tmp_path / "vae")
    dc().network.save_pretrained(tmp_path / "dc")
    with pytest.raises(ValueError, match="stores no image size"):
        load_autoencoder(tmp_path / "dc")
    x = pictures(dc())
    assert torch.equal(load_autoencoder(tmp_path / "dc", 16).encode(x), dc().encode(x))


def write_timm_folder(folder: Path, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    encoder = jitter(timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 7, **kwargs}))
    timm.models.save_for_hf(encoder, str(folder), model_args={**VIT, **kwargs}, safe_serialization=True)
    return encoder


def test_load_a_timm_folder(tmp_path: Path) -> None:
    encoder = write_timm_folder(tmp_path / MISLEADING)
    again = load_autoencoder(tmp_path / MISLEADING, decoder_dim=48, num_decoder_layers=1)
    x = pictures(again)
    config = again.config
    assert (config.image_size, config.patch_size, config.latent_dim, config.decoder_dim) == (64, 16, 32, 48)
    with torch.no_grad():
        expected = encoder.forward_features(normalize((x + 1) / 2, config.pixel_mean, config.pixel_std))[:, 1:]
    torch.testing.assert_close(again.encode(x), expected)
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_autoencoder(tmp_path / "ours").encode(x), again.encode(x))
    with pytest.raises(ValueError, match=r"image_size=32, but .* 64 pixels; with encoder_kwargs=\{'img_size': 32\}"):
        load_autoencoder(tmp_path / MISLEADING, 32)
    smaller = load_autoencoder(tmp_path / MISLEADING, 32, encoder_kwargs={"img_size": 32})
    resampled = timm.create_model(f"local-dir:{tmp_path / MISLEADING}", pretrained=True, img_size=32).eval()
    x = pictures(smaller)
    with torch.no_grad():
        expected = resampled.forward_features(normalize((x + 1) / 2, config.pixel_mean, config.pixel_std))[:, 1:]
    assert expected.shape == (4, 4, 32)
    torch.testing.assert_close(smaller.encode(x), expected)


def test_a_timm_folder_with_other_arguments_and_with_a_missing_tensor(tmp_path: Path) -> None:
    """Pooling by the mean puts the final norm behind the pooling: the encoder that is rebuilt must know."""
    encoder = write_timm_folder(tmp_path, global_pool="avg")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["img_size"]  # as published folders have it: the size stands among the facts of the weights
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_autoencoder(tmp_path)
    assert isinstance(encoder.norm, nn.Identity) and isinstance(again.encoder.norm, nn.Identity)
    x = pictures(again)
    with torch.no_grad():
        tokens = encoder.forward_features(normalize((x + 1) / 2, again.config.pixel_mean, again.config.pixel_std))
    torch.testing.assert_close(again.encode(x), tokens[:, 1:])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["blocks.1.norm1.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.bias"):
        load_autoencoder(tmp_path)


def test_load_by_a_timm_name() -> None:
    again = load_autoencoder(timm_name="vit_tiny_patch16_224", encoder_kwargs=VIT, dtype=torch.bfloat16, **DECODER)
    assert again.config.pixel_mean == list(again.encoder.pretrained_cfg["mean"]) and again.dtype == torch.bfloat16
    assert again.encode(pictures(again)).shape == (4, 16, 32)
    with pytest.raises(ValueError, match="give one of them"):
        load_autoencoder("folder", timm_name="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="timm cannot make 'vit_tinny'"):
        load_autoencoder(timm_name="vit_tinny")
    with pytest.raises(ValueError, match="timm cannot make .*embed_dimm"):
        load_autoencoder(timm_name="vit_tiny_patch16_224", encoder_kwargs={"embed_dimm": 3})
    with pytest.raises(ValueError, match="choose a plain vision transformer"):
        load_autoencoder(timm_name="resnet10t")


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs name_or_path or timm_name"):
        load_autoencoder()
    with pytest.raises(ValueError, match=r"has no config\.json; .*takes an Orthus autoencoder"):
        load_autoencoder(tmp_path)
    PatchAutoencoder(PatchAutoencoderConfig(image_size=8, patch_size=4, hidden_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="orthus_patch_autoencoder, which has no option merge"):
        load_autoencoder(tmp_path, merge=2)
    for fields, words in (
        ({"model_type": "orthus_diffusion_head"}, "model_type 'orthus_diffusion_head'"),
        ({"model_type": "bert"}, "model_type 'bert'.*AutoencoderKL or AutoencoderDC"),
        ({"_class_name": "UNet2DModel"}, "_class_name 'UNet2DModel'"),
        ({}, "no kind of model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=words):
            load_autoencoder(tmp_path)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    representation().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "decoder.positions": torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"misshaped tensors \(decoder\.positions"):
        load_autoencoder(tmp_path)
    del tensors["encoder.cls_token"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*encoder\.cls_token"):
        load_autoencoder(tmp_path)
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match="damaged"):
        load_autoencoder(tmp_path)
    shutil.move(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle can run code"):
        load_autoencoder(tmp_path)


# ---------------------------------------------------------------------- configs and libraries


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (DiffusersAutoencoderConfig, {"network_class": "AutoencoderLK"}, "did you mean 'AutoencoderKL'"),
        (DiffusersAutoencoderConfig, {"network_config": KL, "image_size": 30, "merge": 2}, r"image_size=30 .* = 2 \* 2"),
        (DiffusersAutoencoderConfig, {"network_config": KL, "merge": 0}, "merge"),
        (DiffusersAutoencoderConfig, {"network_config": {"block_out_channels": [8, 8]}}, "'block_out_channels': 2"),
        (DiffusersAutoencoderConfig, {"network_config": {"in_channels": 4}}, "network_config.in_channels=4"),
        (DiffusersAutoencoderConfig, {"latent_noise": -1.0}, "latent_noise=-1.0"),
        (DiffusersAutoencoderConfig, {"marge": 2}, "merge"),
        (RepresentationAutoencoderConfig, {"image_size": 100}, "image_size=100 is not a multiple of patch_size=16"),
        (RepresentationAutoencoderConfig, {"encoder_kwargs": VIT}, "image_size=224, but encoder_kwargs.img_size=64"),
        (RepresentationAutoencoderConfig, {"encoder_kwargs": {"img_size": [224, 64]}}, "224 x 64 pixels are not square"),
        (RepresentationAutoencoderConfig, {"decoder_dim": 100}, "decoder_dim=100"),
        (RepresentationAutoencoderConfig, {"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std"),
        (RepresentationAutoencoderConfig, {"latent_noise": -1.0}, "latent_noise=-1.0"),
        (RepresentationAutoencoderConfig, {"encoder_nam": "vit"}, "encoder_name"),
    ],
)
def test_bad_configs_are_refused(config: Any, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**fields)


def test_configs_that_the_library_contradicts_are_refused() -> None:
    with pytest.raises(ValueError, match="refuses network_config: .*latent_chanels"):
        DiffusersAutoencoder(DiffusersAutoencoderConfig(network_config={**KL, "latent_chanels": 3}))
    config = RepresentationAutoencoderConfig(encoder_kwargs=VIT, image_size=64, latent_dim=16, **DECODER)
    with pytest.raises(ValueError, match="latent_dim=16, but .* has width 32"):
        RepresentationAutoencoder(config)
    wrong = representation(patch_size=32)
    with pytest.raises(ValueError, match=r"shape \(4, 17, 32\) .* not \(N, 4, C\)"):
        wrong.encode(pictures(wrong))


@pytest.mark.parametrize("library", ["diffusers", "timm"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library} .*pip install 'orthus\[autoencoders\]'"):
        kl() if library == "diffusers" else representation()


def test_import_orthus_knows_the_configs_and_imports_no_library() -> None:
    code = (
        "import sys, orthus; from transformers import AutoConfig\n"
        "for name in ('diffusers', 'representation'):\n"
        "    assert AutoConfig.for_model(f'orthus_{name}_autoencoder').num_latents\n"
        "assert not {'diffusers', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
