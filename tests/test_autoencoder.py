"""Both autoencoders: shapes, what a latent sees, calibration, training noise, sums and counts, errors, saving."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthus.autoencoder import Autoencoder, PatchAutoencoder, PatchAutoencoderConfig, VQGANAutoencoder, VQGANAutoencoderConfig


def patch_autoencoder(**changes: float) -> PatchAutoencoder:
    torch.manual_seed(0)
    sizes = {"image_size": 24, "patch_size": 8, "latent_dim": 5, "hidden_dim": 16, "num_layers": 1}
    return PatchAutoencoder(PatchAutoencoderConfig(**{**sizes, **changes})).eval()


def vqgan_autoencoder(**changes: object) -> VQGANAutoencoder:
    torch.manual_seed(0)
    sizes = {"resolution": 16, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 8}
    return VQGANAutoencoder(VQGANAutoencoderConfig(**{**sizes, "embed_dim": 6, **changes})).eval()


def pictures(autoencoder: Autoencoder, num: int = 4) -> Tensor:
    size = autoencoder.config.image_size
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


BOTH = pytest.mark.parametrize("autoencoder", [patch_autoencoder(), vqgan_autoencoder(), vqgan_autoencoder(attn_resolutions=[8])])


@BOTH
def test_interface(autoencoder: Autoencoder, tmp_path: Path) -> None:
    config, x = autoencoder.config, pictures(autoencoder)
    latents = autoencoder.encode(x)
    assert latents.shape == (4, config.num_latents, config.latent_dim)
    assert autoencoder.decode(latents).shape == x.shape
    autoencoder.save_pretrained(tmp_path)
    again = type(autoencoder).from_pretrained(tmp_path)
    assert torch.equal(again.encode(x), latents)
    with pytest.raises(ValueError, match="resize and crop with the processor"):
        autoencoder.encode(x[..., 1:])
    with pytest.raises(ValueError, match="whole images only"):
        autoencoder.decode(latents[:, 1:])


@BOTH
def test_loss_is_a_sum_and_a_count(autoencoder: Autoencoder) -> None:
    x = pictures(autoencoder)
    output = autoencoder(x)
    expected = torch.nn.functional.mse_loss(autoencoder.decode(autoencoder.encode(x)), x)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.loss_sums["reconstruction"] / output.loss_counts["reconstruction"], expected)
    assert output.loss_counts == autoencoder.count_targets({"pixel_values": x}) == {"reconstruction": x.numel()}
    output.loss.backward()
    without = [name for name, parameter in autoencoder.named_parameters() if parameter.grad is None]
    assert not without


def test_one_latent_says_everything_about_its_patch_and_nothing_else() -> None:
    autoencoder = patch_autoencoder()
    x = pictures(autoencoder, 1)
    changed = x.clone()
    changed[..., 8:16, 16:24] += 0.5  # row 1, column 2 of 3 x 3 patches: raster index 5
    latents, other = autoencoder.encode(x), autoencoder.encode(changed)
    differs = (latents != other).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [5]
    pixels = (autoencoder.decode(latents) != autoencoder.decode(other)).any(1)[0]
    outside = pixels.clone()
    outside[8:16, 16:24] = False
    assert pixels.any() and not outside.any()


def test_calibrated_latents_have_zero_mean_and_unit_variance() -> None:
    autoencoder = patch_autoencoder()
    x = pictures(autoencoder, 32)
    before = autoencoder.decode(autoencoder.encode(x))
    for _ in range(2):  # calibrating again changes nothing
        autoencoder.calibrate(x)
        latents = autoencoder.encode(x).flatten(0, 1)
        torch.testing.assert_close(latents.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(latents.std(0), torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), before, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="constant latent channel"):
        autoencoder.calibrate(torch.zeros_like(x))


def test_noise_is_drawn_in_training_only_and_has_the_stated_strength() -> None:
    autoencoder = patch_autoencoder(latent_noise=0.5)
    x = pictures(autoencoder)
    assert torch.equal(autoencoder(x).pixel_values, autoencoder.decode(autoencoder.encode(x)))
    noise = torch.randn(4, 9, 5)
    torch.testing.assert_close(autoencoder(x, noise=noise).pixel_values, autoencoder.decode(autoencoder.encode(x) + noise))
    autoencoder.train()
    assert not torch.equal(autoencoder(x).pixel_values, autoencoder(x).pixel_values)
    strengths = autoencoder.draw_noise(torch.zeros(2000, 200, 5)).std(dim=(1, 2))  # uniform in [0, 0.5]
    assert 0.24 < strengths.mean() < 0.26 and strengths.max() < 0.55


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=30 is not a multiple of patch_size=8"):
        PatchAutoencoderConfig(image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="latent_noise"):
        PatchAutoencoderConfig(latent_noise=-1.0)
    with pytest.raises(ValueError, match="resolution=18"):
        VQGANAutoencoderConfig(resolution=18)
    with pytest.raises(ValueError, match="double_latent"):
        VQGANAutoencoderConfig(double_latent=True)
