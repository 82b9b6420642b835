"""How well an autoencoder gives pictures back: PSNR, SSIM, and on request LPIPS, rFID and rKID of its round trip.

`python -m eval.reconstruction model=checkpoints/orthus-small [images=FOLDER] [output=runs/reconstruction]`
`python -m eval.reconstruction model=FOLDER images=FOLDER fid=true lpips=vgg [inception=FILE.pt]`

Of an Orthus only the autoencoder is read; a bare autoencoder (ours, diffusers, timm, Chameleon) does as well. Writes results.json
and sheet.png, pairs of rows before and after. `pip install 'orthus[metrics]'`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from eval import picture_engines as engines
from eval.exits import exit_code
from eval.loading import require_model
from eval.picture_folders import opened, read_folder
from eval.provenance import from_command_line, provenance
from eval.statistics import Task, bootstrap, interval_text
from eval.whole_files import write_json
from orthus.autoencoder import Autoencoder
from orthus.autoencoder_loading import load_autoencoder
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.render import picture
from orthus.image_processing import OrthusImageProcessor
from orthus.processing import OrthusProcessor

WORLD_PICTURES = 1000
SHEET_COLUMNS, SHEET_PICTURES, SHEET_SIDE, SHEET_GAP = 8, 24, 128, 4


@dataclass(frozen=True)
class Settings:
    """What is measured on which pictures; see `python -m eval.reconstruction --help`.

    model: an Orthus or a bare autoencoder, folder or hub name.
    images: folder of pictures (flat, or GenEval's layout); empty: the small world's test split.
    num_pictures: how many, from the first; null: the whole folder, or 1,000 of the small world.
    fid: rFID and rKID, with `inception` (empty: torch-fidelity's weights from the web; else a TorchScript file) and `resizer`
        (clean or tf1).
    lpips: no, alex, vgg or squeeze, whose ImageNet weights torchvision fetches.
    """

    model: str
    images: str = ""
    num_pictures: int | None = None
    output: str = "runs/reconstruction"
    fid: bool = False
    inception: str = ""
    resizer: Literal["clean", "tf1"] = "clean"
    lpips: Literal["no", "alex", "vgg", "squeeze"] = "no"
    batch_size: int = 32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; give at least 1")
        if self.inception and not self.fid:
            raise ValueError(f"inception={self.inception!r} is used by fid=true only; set that too")


def load(name: str) -> tuple[Autoencoder, OrthusImageProcessor]:
    """The autoencoder of a model, and what prepares its pictures: the stored processor, else the default of its size."""
    require_model(name)
    autoencoder = load_autoencoder(name)
    if (Path(name) / "processor_config.json").is_file():
        return autoencoder, OrthusProcessor.from_pretrained(name).image_processor
    return autoencoder, OrthusImageProcessor(size=autoencoder.config.image_size)


def source(settings: Settings) -> tuple[Iterable[Image.Image], int, str]:
    """The pictures, their number and their name. Raises ValueError if the folder holds fewer than asked for."""
    if settings.images:
        files = read_folder(settings.images)
        wanted = settings.num_pictures or len(files)
        if len(files) < wanted:
            raise ValueError(f"num_pictures={wanted}, but {settings.images} holds {len(files)} pictures; ask for fewer")
        return opened(files[:wanted]), wanted, settings.images
    dataset = WorldDataset("test", {"describe": 1.0})
    wanted = settings.num_pictures or WORLD_PICTURES
    return (picture(dataset.scenes(index)[0]) for index in range(wanted)), wanted, "small world, split test"


@dataclass
class Measured:
    """Values by picture, what is shown of them, and Inception features before and after by batch."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    shown: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    features: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))


@torch.no_grad()
def round_trips(
    autoencoder: Autoencoder, processor: OrthusImageProcessor, pictures: Iterable[Image.Image], batch_size: int
) -> Iterator[tuple[list[Image.Image], list[Image.Image]]]:
    """Batches of pictures as the autoencoder is shown them (resized and cropped), and as it gives them back."""
    for chunk in engines.chunks(pictures, batch_size):
        before = [processor.prepare(image) for image in chunk]
        latents = autoencoder.encode(processor.pixel_values(before))
        yield before, processor.postprocess(autoencoder.decode(latents))


def fidelity(before: Tensor, after: Tensor) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM (Gaussian window of 11, sigma 1.5) of each RGB picture, uint8 `(N, 3, H, W)`, through torchmetrics.

    The PSNR of a picture that came back exactly is infinite. SSIM is right to 2e-4, as flat parts cancel in single precision
    (double takes twelve times as long).
    """
    image = engines.engine("torchmetrics.functional.image")
    shown, given = before.float() / 255, after.float() / 255
    psnr = image.peak_signal_noise_ratio(given, shown, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = image.structural_similarity_index_measure(given, shown, data_range=1.0, reduction="none")
    return psnr.tolist(), ssim.reshape(-1).tolist()


def load_lpips(network: str) -> Any:
    """torchmetrics' LPIPS of pictures in [0, 1]. OSError if torchvision cannot fetch the network's weights."""
    perceptual = engines.engine("torchmetrics.image.lpip")
    try:
        return perceptual.LearnedPerceptualImagePatchSimilarity(network, reduction="none", normalize=True)
    except OSError as error:
        raise OSError(
            f"cannot fetch the {network} weights of LPIPS ({error}); put torchvision's file into the checkpoints folder of "
            "torch.hub.get_dir(), or leave lpips=no"
        ) from error


def measure(autoencoder: Autoencoder, processor: OrthusImageProcessor, settings: Settings) -> tuple[Measured, dict[str, Any]]:
    """Everything of one pass over the pictures, and the result."""
    pictures, num_pictures, name = source(settings)
    lpips = load_lpips(settings.lpips) if settings.lpips != "no" else None
    inception = engines.load_inception(settings.inception, settings.device) if settings.fid else None
    found = Measured()
    for before, after in round_trips(autoencoder, processor, pictures, settings.batch_size):
        shown, given = engines.as_tensor(before), engines.as_tensor(after)
        psnr, ssim = fidelity(shown, given)
        found.psnr += psnr
        found.ssim += ssim
        if lpips is not None:
            with torch.no_grad():
                found.lpips += lpips(given.float() / 255, shown.float() / 255).reshape(-1).tolist()
        if inception is not None:
            for values, images in zip(found.features, (before, after), strict=True):
                values.append(engines.features(images, inception, settings.resizer, settings.batch_size))
        found.shown += list(islice(zip(before, after, strict=True), max(0, SHEET_PICTURES - len(found.shown))))
    result: dict[str, Any] = {"pictures": name, "num_pictures": num_pictures, "image_size": list(found.shown[0][0].size)}
    result |= summary(found, settings)
    if inception is not None:
        a, b = (torch.cat(values) for values in found.features)
        result["rfid"] = engines.distances(a, b, inception, settings.resizer, settings.seed)
    return found, result


def summary(found: Measured, settings: Settings) -> dict[str, Any]:
    """Intervals over pictures. PSNR is left out where `num_exact` pictures came back exactly: theirs is infinite."""
    num_exact = sum(value == float("inf") for value in found.psnr)
    values = {"ssim": found.ssim} | ({} if num_exact else {"psnr": found.psnr})
    if found.lpips:
        values[f"lpips_{settings.lpips}"] = found.lpips
    cells = {name: bootstrap(Task(numbers), seed=settings.seed).as_dict() for name, numbers in values.items()}
    return {"num_exact": num_exact, **cells}


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Rows of pictures as shown to the autoencoder, each above the row of what it gave back; small ones enlarged crisply."""
    width, height = pairs[0][0].size
    factor = max(1, SHEET_SIDE // width)
    side, tall = width * factor + SHEET_GAP, height * factor + SHEET_GAP
    num_rows = -(-len(pairs) // SHEET_COLUMNS)
    made = Image.new("RGB", (min(len(pairs), SHEET_COLUMNS) * side, 2 * num_rows * tall), "white")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, SHEET_COLUMNS)
        for below, image in enumerate(pair):
            large = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            made.paste(large, (column * side, (2 * row + below) * tall))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the results and the sheet, print the numbers."""
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    autoencoder, processor = load(settings.model)
    torch.nn.Module.to(autoencoder, settings.device)
    found, result = measure(autoencoder, processor, settings)
    folder = Path(settings.output)
    os.makedirs(folder, exist_ok=True)
    sheet(found.shown).save(folder / "sheet.png")
    origin = provenance(settings, "eval.reconstruction")
    versions = {"torchmetrics": engines.engine("torchmetrics").__version__}
    write_json(folder / "results.json", {**result, **origin, "versions": {**origin["versions"], **versions}})
    for name in ("psnr", "ssim", f"lpips_{settings.lpips}"):
        if name in result:
            print(f"{name}: {interval_text(result[name])}, n = {result[name]['n']}")
    if "rfid" in result:
        print(f"rFID {result['rfid']['fid']:.3f}, rKID {result['rfid']['kid']:.5f}, n = {result['num_pictures']}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
