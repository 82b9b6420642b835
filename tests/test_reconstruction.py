"""Round trips of autoencoders: PSNR and SSIM against their formulas, the sheet, the results, and what is refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eval import picture_engines as engines
from eval import reconstruction
from eval.reconstruction import Settings
from orthus.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from orthus.image_processing import OrthusImageProcessor

SIDE = 16


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = PatchAutoencoderConfig(image_size=SIDE, patch_size=4, latent_dim=3, hidden_dim=16, num_layers=1)
    folder = tmp_path_factory.mktemp("autoencoder")
    PatchAutoencoder(config).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


def test_psnr_and_ssim_are_those_of_their_formulas() -> None:
    shown = torch.full((2, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    given = shown.clone()
    given[1] += 10
    psnr, ssim = reconstruction.fidelity(shown, given)
    assert psnr[0] == math.inf and psnr[1] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    a, b, c = 100 / 255, 110 / 255, 0.01**2
    assert ssim == pytest.approx([1.0, (2 * a * b + c) / (a * a + b * b + c)], abs=2e-4), "of flat pictures only means differ"


def test_results_and_sheet_of_a_folder(autoencoder_folder: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    reconstruction.main([f"model={autoencoder_folder}", f"images={pictures}", f"output={output}", "batch_size=2"])
    result = json.loads((output / "results.json").read_text())
    autoencoder, processor = reconstruction.load(str(autoencoder_folder))
    values = []
    for path in sorted(pictures.iterdir()):
        with Image.open(path) as image:
            before = processor.prepare(image.convert("RGB"))
        with torch.no_grad():
            latents = autoencoder.encode(processor.pixel_values([before]))
            (after,) = processor.postprocess(autoencoder.decode(latents))
        error = np.mean((np.asarray(before, float) - np.asarray(after, float)) ** 2)
        values.append(10 * math.log10(255**2 / error))
    assert result["psnr"]["value"] == pytest.approx(np.mean(values), abs=1e-3)
    assert result["psnr"]["low"] <= result["psnr"]["value"] <= result["psnr"]["high"] and result["psnr"]["n"] == 5
    assert result["num_exact"] == 0 and result["image_size"] == [SIDE, SIDE] and "rfid" not in result
    assert result["command"].startswith("python -m eval.reconstruction") and len(result["weights_sha256"]) == 64
    assert "torchmetrics" in result["versions"] and result["settings"]["images"] == str(pictures)
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.size == (5 * (128 + 4), 2 * (128 + 4))


def test_an_orthus_gives_its_autoencoder_and_its_own_processor() -> None:
    folder = Path(__file__).parent.parent / "checkpoints" / "orthus-small"
    autoencoder, processor = reconstruction.load(str(folder))
    settings = Settings(str(folder), num_pictures=8)
    found, result = reconstruction.measure(autoencoder, processor, settings)
    assert result["pictures"] == "small world, split test" and result["num_pictures"] == len(found.psnr) == 8
    assert result["psnr"]["value"] > 30 and result["ssim"]["value"] > 0.95


class Unchanged(nn.Module):
    """An autoencoder that loses nothing."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents + 1e-3  # postprocess truncates: this is rounding


def test_pictures_that_come_back_exactly_are_counted(pictures: Path) -> None:
    settings = Settings("", images=str(pictures))
    unchanged: Any = Unchanged()
    _, result = reconstruction.measure(unchanged, OrthusImageProcessor(SIDE), settings)
    assert result["num_exact"] == 5 and "psnr" not in result and result["ssim"]["value"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:FID from")
def test_rfid_and_lpips_compare_before_with_after(autoencoder_folder: Path, pictures: Path, monkeypatch: Any) -> None:
    class MeanColor(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.float().mean((2, 3))

    inception = engines.Inception(MeanColor(), "mean colour")
    monkeypatch.setattr(engines, "load_inception", lambda file, device: inception)
    monkeypatch.setattr(reconstruction, "load_lpips", lambda name: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    autoencoder, processor = reconstruction.load(str(autoencoder_folder))
    settings = Settings("", images=str(pictures), fid=True, lpips="vgg", batch_size=2)
    found, result = reconstruction.measure(autoencoder, processor, settings)
    before, after = ([pair[side] for pair in found.shown] for side in (0, 1))
    sides = [engines.features(images, inception) for images in (before, after)]
    assert result["rfid"] == engines.distances(*sides, inception, "clean")
    error = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255 for a, b in found.shown]
    assert result["lpips_vgg"]["value"] == pytest.approx(np.mean(error), abs=1e-5)
    assert result["rfid"]["network"] == "mean colour" and result["rfid"]["num_pictures"] == [5, 5]


def test_sheet_has_each_picture_above_what_came_back() -> None:
    pairs = [(Image.new("RGB", (64, 64), (number, 0, 0)), Image.new("RGB", (64, 64), (0, number, 0))) for number in range(1, 11)]
    sheet = reconstruction.sheet(pairs)
    assert sheet.size == (8 * 132, 4 * 132)
    assert [sheet.getpixel((132 + 60, 60 + 132 * row)) for row in range(4)] == [(2, 0, 0), (0, 2, 0), (10, 0, 0), (0, 10, 0)]


def test_wrong_settings_name_the_fix(pictures: Path) -> None:
    with pytest.raises(ValueError, match="num_pictures=0; give at least 1"):
        Settings("m", num_pictures=0)
    with pytest.raises(ValueError, match="used by fid=true only"):
        Settings("m", inception="file.pt")
    with pytest.raises(ValueError, match="holds 5 pictures; ask for fewer"):
        reconstruction.source(Settings("m", images=str(pictures), num_pictures=6))
    images, number, name = reconstruction.source(Settings("m", images=str(pictures), num_pictures=2))
    assert len(list(images)) == number == 2 and name == str(pictures)
    with pytest.raises(ValueError, match=r"no config\.json"):
        reconstruction.load(str(pictures))


def test_lpips_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise URLError("no route")

    module = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=offline)
    monkeypatch.setattr(engines, "engine", lambda name: module)
    with pytest.raises(OSError, match="leave lpips=no"):
        reconstruction.load_lpips("alex")
