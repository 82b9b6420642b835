"""Arithmetic of training: what the batches of a step ask for, and how many operations of matrix products that takes.

Both `--dry-run` and MFU count with it: the first with rows as they are computed, the second with what the examples need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from orthus.configuration import IGNORE_INDEX
from orthus.modeling import OrthusForConditionalGeneration
from orthus.training.sharding import backbone_layers

AMOUNTS = ("tokens", "real_tokens", "pairs", "images")
"""What [`amounts`] counts of a batch besides its targets."""


@dataclass(frozen=True)
class Work:
    """What a model is to train on. `num_pairs`: of tokens of the same example, those that a causal mask hides too."""

    num_tokens: float = 0.0
    num_pairs: float = 0.0
    num_images: float = 0.0  # seen or drawn
    num_text_targets: float = 0.0
    num_latent_targets: float = 0.0


def work_of(sums: Mapping[str, float]) -> Work:
    """Of what a run sums up for its log: `real_tokens`, `pairs`, `images`, `count/text`, `count/image`."""
    names = ("real_tokens", "pairs", "images", "count/text", "count/image")
    return Work(*(sums.get(name, 0.0) for name in names))


def amounts(batch: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Of a batch, in the order of `AMOUNTS`: tokens, those that are not padding, the sum of the squared lengths of examples, and
    pictures (`image_latents`, where they are there, are those of all of them)."""
    pictures = batch.get("image_latents", batch.get("pixel_values"))
    num_images = 0 if pictures is None else len(pictures)
    if "input_ids" not in batch:
        return 0, 0, 0, num_images
    lengths = example_lengths(batch)
    return batch["input_ids"].numel(), int(lengths.sum()), int(lengths.square().sum()), num_images


def example_lengths(batch: Mapping[str, Any]) -> Tensor:
    """Tokens of each example, without padding: rows of `attention_mask`, or stretches of rows in which `position_ids` count up
    from 0 (those without a label are padding), or else whole rows."""
    input_ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        return (mask != 0).sum(-1).cpu()
    if positions is None:
        return torch.full(input_ids.shape[:1], input_ids.shape[-1])
    begins = positions == 0
    begins[:, 0] = True
    number = begins.flatten().cumsum(0) - 1  # of the example that a token belongs to
    teaches = torch.zeros(int(number[-1]) + 1, dtype=torch.bool, device=number.device)
    teaches[number[(batch["labels"] != IGNORE_INDEX).flatten()]] = True
    return number.bincount()[teaches].cpu()


def attention_widths(config: Any) -> tuple[int, int]:
    """Values of all query heads, and of all key heads, of one token in a layer of a backbone with this config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def flops(
    model: OrthusForConditionalGeneration, work: Work, with_encoder: bool = True, is_checkpointed: bool = False
) -> dict[str, float]:
    """Estimate by part, linear in `work`: two operations per weight and position forward, as many for the gradients of inputs,
    and again for those of weights that train; `is_checkpointed` layers are computed twice. `with_encoder`: of pictures too."""
    config, layers = model.config, backbone_layers(model)
    matrices = [p for layer in layers for name, p in layer.named_parameters() if p.ndim >= 2 and "norm" not in name]
    num_all, num_learned = (sum(p.numel() for p in matrices if p.requires_grad or every) for every in (True, False))
    passes = 3 if is_checkpointed else 2
    scores = 4 * work.num_pairs * attention_widths(config.text_config)[0] * len(layers)
    head, draws = model.diffusion_head, config.head_config.num_noise_draws
    once = head.cond_embed.weight.numel()
    per_latent = 2 * (draws * (sum(p.numel() for p in head.parameters()) - once) + once)
    soft_vq = 2 * config.num_codes * (config.head_config.latent_dim + config.text_config.hidden_size)
    seen = 0 if config.latent_embedding == "linear" else work.num_images * config.num_latents
    encoded = work.num_images if with_encoder else 0
    return {
        "backbone": float(2 * work.num_tokens * (passes * num_all + num_learned) + (passes + 1) * scores),
        "LM head": 3.0 * 2 * work.num_text_targets * model.lm_head.weight.numel(),
        "diffusion head": 3.0 * work.num_latent_targets * per_latent,
        "soft VQ": 3.0 * seen * soft_vq,
        "picture encoder": float(encoded * encoder_flops(model)) if encoded else 0.0,
    }


def flops_by_amount(model: OrthusForConditionalGeneration, with_encoder: bool) -> Work:
    """Operations for one of each amount of [`Work`], without what is computed twice; see [`dot`]."""
    ones = {field.name: replace(Work(), **{field.name: 1.0}) for field in fields(Work)}
    return Work(**{name: sum(flops(model, one, with_encoder).values()) for name, one in ones.items()})


def dot(one: Work, other: Work) -> float:
    """Sum over all amounts of the products."""
    return float(sum(getattr(one, field.name) * getattr(other, field.name) for field in fields(Work)))


def encoder_flops(model: OrthusForConditionalGeneration) -> int:
    """Exact for matrix products and convolutions: of encoding one picture."""
    size = model.config.autoencoder_config.image_size
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoModel.from_config(model.config.autoencoder_config).encode(torch.empty(1, 3, size, size))
    return int(counter.get_total_flops())
