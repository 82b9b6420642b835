"""Sizes that are measured: a preset is a model of random weights and what is measured of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthus.autoencoder import PatchAutoencoderConfig, VQGANAutoencoderConfig
from orthus.configuration import OrthusConfig
from orthus.diffusion_head import ZeroLinear
from orthus.modeling import OrthusForConditionalGeneration

SEED = 0
PROMPT_TOKENS, UNCONDITIONAL_TOKENS = 16, 5
ZERO_STD = 0.02  # of weights that training starts at zero, so that the head does something


@dataclass(frozen=True)
class Preset:
    """A model and its measurements.

    Args:
        positions: raster places at which seconds per latent are measured.
        batches: batch sizes of the exact sampler; their ratios to the reference loop are reported.
        low_batch: batch size of the exact sampler in `low_dtype`.
        num_latents: latents per measurement at batch 1, with the exact sampler; `num_others` for everything else.
        num_compared: first latents of which the picture is compared with the reference loop's.
        grid: batch sizes, numbers of diffusion steps and solvers that are measured besides.
        bandwidth_bytes, matrix_side: of the tensors with which the machine is measured, well beyond any cache.
    """

    device: str
    dtype: str
    guidance: float
    positions: tuple[int, ...]
    batches: tuple[int, ...]
    low_batch: int
    low_dtype: str
    num_latents: int
    num_others: int
    num_compared: int
    repeats: int
    grid: tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]
    bandwidth_bytes: int
    matrix_side: int


PRESETS = {
    "tiny": Preset("cpu", "float32", 3.0, (1, 4), (1, 2), 2, "bfloat16", 1, 1, 4, 1, ((1,), (3,), ("ddim",)), 2**22, 256),
    "cpu-mid": Preset(
        "cpu", "float32", 5.0, (1, 64, 256, 512, 1024), (1, 8), 32, "bfloat16", 15, 2, 6, 2,
        ((1,), (10,), ("ddim", "dpm++2m")), 2**29, 2048,
    ),
    "gpu-7b": Preset(
        "cuda", "bfloat16", 5.0, (1, 64, 256, 512, 1024), (1, 8, 16), 32, "bfloat16", 15, 4, 16, 3,
        ((1, 16), (10,), ("ddim", "dpm++2m")), 2**33, 8192,
    ),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_config(name: str) -> OrthusConfig:
    """The model of a preset. Latents are not rescaled for the head: with random weights it then draws latents about as large
    as the codes, as a trained one does with its factor."""
    find_preset(name)
    if name == "tiny":
        return _tiny_config()
    head: dict[str, Any] = {"latent_dim": 256, "width": 1536, "num_blocks": 3, "latent_scale": 1.0}
    autoencoder: Any = VQGANAutoencoderConfig()
    if name == "cpu-mid":
        autoencoder = PatchAutoencoderConfig(image_size=512, patch_size=16, latent_dim=256, hidden_dim=64, num_layers=1)
    sizes = (512, 8, 8, 1376) if name == "cpu-mid" else (4096, 32, 32, 11008)
    return OrthusConfig(
        text_config=_llama(65536, *sizes, max_position_embeddings=4096),
        autoencoder_config=autoencoder,
        head_config={**head, "cond_dim": sizes[0]},
    )


def _llama(vocab: int, hidden: int, layers: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": intermediate, **others,
    }  # fmt: skip


def _tiny_config() -> OrthusConfig:
    """4 latents of 3 channels per 8 x 8 picture, for tests."""
    return OrthusConfig(
        text_config=_llama(64, 32, 2, 4, 48, max_position_embeddings=96),
        autoencoder_config=PatchAutoencoderConfig(image_size=8, patch_size=4, latent_dim=3, hidden_dim=16, num_layers=1),
        head_config={
            "width": 16, "num_blocks": 2, "num_diffusion_steps": 5, "time_embed_dim": 8, "latent_dim": 3, "cond_dim": 32,
            "latent_scale": 1.0,
        },
        num_codes=24, code_offset=40, boi_token_id=4, eoi_token_id=5, separator_token_id=6, image_token_id=7,
    )  # fmt: skip


def random_model(config: OrthusConfig, device: torch.device, dtype: torch.dtype) -> OrthusForConditionalGeneration:
    """Made on `device` in `dtype`, the same for the same machine; what starts at zero gets small random values."""
    torch.manual_seed(SEED)
    with device:
        model = OrthusForConditionalGeneration._from_config(config, dtype=dtype)
    model = model.to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.diffusion_head.modules():
            if isinstance(module, ZeroLinear):
                nn.init.normal_(module.weight, std=ZERO_STD)
                nn.init.normal_(module.bias, std=ZERO_STD)
    return model.eval()


def random_prompts(config: Any) -> tuple[Tensor, Tensor]:
    """Ids `(P,)` of a prompt and of the unconditional prompt: random text between begin-of-text and the separator."""
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    special |= set(range(config.code_offset, config.code_offset + config.num_codes))
    texts = torch.tensor([token for token in range(config.text_config.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(SEED)

    def prompt(length: int) -> Tensor:
        drawn = texts[torch.randint(len(texts), (length,), generator=generator)]
        return torch.tensor([config.bos_token_id, *drawn.tolist(), config.separator_token_id])

    return prompt(PROMPT_TOKENS), prompt(UNCONDITIONAL_TOKENS)


def random_latents(config: Any, batch: int, num: int) -> Tensor:
    """Raw latents `(batch, num, C)` of unit variance, as the codes."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(batch, num, config.head_config.latent_dim, generator=generator)


def check_positions(positions: Sequence[int], num_latents: int) -> None:
    """ValueError for a place that an image does not have."""
    for position in positions:
        if not 1 <= position <= num_latents:
            raise ValueError(f"position {position} lies outside the 1..{num_latents} latents of an image; lower positions")
