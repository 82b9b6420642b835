"""Reads tests/goldens: what the published implementation computed. See the README.md there."""

import gzip
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"


def golden(name: str) -> dict[str, Tensor]:
    """Tensors of one item; small integers, which are stored narrow, become int64."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    narrow = (torch.int8, torch.int16)
    return {key: value.long() if value.dtype in narrow else value for key, value in tensors.items()}


def golden_settings(name: str) -> dict[str, str]:
    """What one item was made with: noise seed, guidance, number of diffusion steps."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        return file.metadata()


def noise_per_latent(seed: int, num_latents: int, latent_dim: int) -> Tensor:
    """`(1, 1, L, C)`: the published sampler draws one latent's noise at a time."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(1, latent_dim, generator=generator) for _ in range(num_latents)]
    return torch.cat(draws)[None, None]


def image_code_names(num_codes: int) -> list[str]:
    """Names of the image codes in the published vocabulary: IMGIMG, the digits as letters, Z."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    return [f"IMGIMG{str(index).translate(letters)}Z" for index in range(num_codes)]


def published_config() -> dict:
    """The published config.json; its vocabulary map is stored without the image codes."""
    config = json.loads((FOLDER / "config.json").read_text())
    config["vocabulary_map"] |= {name: 4 + index for index, name in enumerate(image_code_names(8192))}
    return config


def write_published_folder(folder: Path) -> Path:
    """A checkpoint in the published layout, without the quantiser's codebook, written to `folder`."""
    (folder / "config.json").write_text(json.dumps(published_config()))
    weights = gzip.decompress((FOLDER / "checkpoint.safetensors.gz").read_bytes())
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def shapes_of_7b() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 749 tensors of the published 7B layout."""
    shapes = {}
    for line in (FOLDER / "state_dict_7b.txt").read_text().splitlines():
        name, text = line.split("\t")
        shape = tuple(int(size) for size in text.strip("()").split(",") if size.strip())
        head, braces, tail = name.partition("{0..31}")
        layers = range(32) if braces else [""]
        shapes |= {f"{head}{layer}{tail}": shape for layer in layers}
    return shapes
