"""What a latent costs in arithmetic and in bytes of weights, and what the machine can do of both."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from orthus.diffusion_head import AdaLNBlock
from orthus.modeling import OrthusForConditionalGeneration

CEILING_REPEATS = 5


def best_seconds(call: Callable[[], object], device: torch.device, repeats: int = CEILING_REPEATS) -> float:
    """The shortest of several calls, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second at which a tensor in fp32 is summed."""
    tensor = torch.ones(num_bytes // 4, device=device)
    return num_bytes / best_seconds(tensor.sum, device)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of a square matrix product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most allocated since the last reset, else the most that the process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of the parts that a latent reads, and the shapes of attention."""

    backbone: int
    sequential: int  # of the head, what sees the noised latent
    modulation: int
    cond_embed: int
    time_embed: int
    codebook: int
    code_rows: int
    lm_head: int
    itemsize: int
    attention: int  # layers * heads * head_dim
    cache: int  # layers * key-value heads * head_dim


def sizes(model: OrthusForConditionalGeneration) -> Sizes:
    head, config, text = model.diffusion_head, model.config, model.config.text_config
    table, embedding = model.get_input_embeddings(), model.latent_embedding
    modulation = _count(*(cast(AdaLNBlock, block).modulation for block in head.blocks), head.final_modulation)
    others = _count(head.time_embed, head.cond_embed)
    is_linear = embedding.kind == "linear"
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Sizes(
        backbone=_count(model.backbone) - _count(table),
        sequential=_count(head) - modulation - others,
        modulation=modulation,
        cond_embed=_count(head.cond_embed),
        time_embed=_count(head.time_embed),
        codebook=_count(embedding),
        code_rows=0 if is_linear else config.num_codes * text.hidden_size,
        lm_head=_count(model.lm_head),
        itemsize=model.lm_head.weight.itemsize,
        attention=text.num_hidden_layers * text.num_attention_heads * head_dim,
        cache=text.num_hidden_layers * kv_heads * head_dim,
    )


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def costs(size: Sizes, context: int, batch: int, streams: int, num_steps: int, num_passes: float | None) -> dict[str, float]:
    """Of one position of `batch` rows as `generate` advances them: FLOPs that the result needs, bytes of weights and cache read.

    Args:
        context: positions in the cache.
        num_steps: evaluations of the head per latent; `num_passes`: how often its weights are read, less with a look-ahead.
    """
    rows, passes = batch * streams, num_steps if num_passes is None else num_passes
    per_row = size.backbone + num_steps * (size.sequential + size.modulation) + size.cond_embed
    once = size.backbone + size.modulation + size.cond_embed + size.codebook + size.code_rows
    return {
        "flops": 2 * rows * (per_row + 2 * size.attention * context) + 2 * batch * (size.codebook + size.code_rows),
        "weight_bytes": size.itemsize * (once + passes * size.sequential),
        "cache_bytes": size.itemsize * 2 * size.cache * context * rows,
    }


def reference_costs(size: Sizes, context: int, position: int, streams: int, num_steps: int) -> dict[str, float]:
    """The same of one position of the reference loop at raster place `position`."""
    head = size.sequential + size.modulation + size.cond_embed + size.time_embed
    per_row = size.backbone + num_steps * head + size.lm_head + position * (size.codebook + size.code_rows)
    return {
        "flops": 2 * streams * (per_row + 2 * size.attention * context),
        "weight_bytes": size.itemsize
        * (size.backbone + num_steps * head + size.lm_head + streams * (size.codebook + size.code_rows)),
        "cache_bytes": size.itemsize * 2 * size.cache * context * streams,
    }


def floor_seconds(size: Sizes, bytes_per_second: float) -> float:
    """Seconds in which every weight that a latent needs is read once from memory."""
    once = size.backbone + size.modulation + size.cond_embed + size.sequential + size.codebook + size.code_rows
    return size.itemsize * once / bytes_per_second


def per_image(seconds: dict[int, float], num_latents: int) -> float:
    """Seconds of all latents of an image: the integral of seconds per latent over raster places, linear between those that were
    measured and constant beyond."""
    places: Sequence[int] = sorted(seconds)
    total = seconds[places[0]] * places[0] + seconds[places[-1]] * (num_latents - places[-1])
    for low, high in zip(places, places[1:], strict=False):
        total += (high - low) * (seconds[low] + seconds[high]) / 2
    return total
