"""Optimisers, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from orthus.training.settings import OptimSettings
from orthus.training.sharding import by_mesh, local_value

HEAD_MATRIX_MAX_ASPECT = 2  # of the diffusion head Muon takes the MLPs, not the three times taller adaLN matrices


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Stop training the named children, dotted sub-modules or parameters.

    Raises ValueError for a name that the model lacks, and for an LM head that shares its weights with token embeddings which are
    to be trained.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if "lm_head" in parts and "lm_head.weight" not in parameters and "lm_head" in modules and "backbone" not in parts:
        raise ValueError("cannot freeze lm_head alone: it is tied to the token embeddings; take it out of `frozen`")
    for part in parts:
        if part not in modules and part not in parameters:
            children = ", ".join(dict(model.named_children()))
            raise ValueError(f"cannot freeze {part!r}: the model has no such part; it has {children}")
        chosen = modules[part] if part in modules else parameters[part]
        chosen.requires_grad_(False)


def build_optimizers(model: nn.Module, settings: OptimSettings) -> list[Optimizer]:
    """Optimisers over the trainable parameters: AdamW, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay applies to the weights of linear and convolution layers only: never to biases, norms, embeddings or
    the codebook. Each parameter group carries its `peak_lr`.
    Raises ValueError if nothing is trainable, or if Muon is asked for and no matrix suits it.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameter; unfreeze a part before training")
    decayed = _decayed_names(model) & trainable.keys()
    muon_names = _muon_names(model) & decayed if settings.optimizer == "muon" else set()
    if settings.optimizer == "muon" and not muon_names:
        raise ValueError(
            f"optim.optimizer is 'muon', but {type(model).__name__} has no trainable matrix in the layers of "
            "`backbone` or `diffusion_head`; use optim.optimizer=adamw"
        )
    optimizers: list[Optimizer] = []
    factors = lr_factors(model, settings.lr_factors)
    if muon_names:
        groups = _groups(trainable, muon_names, factors, settings.muon_lr, settings.weight_decay)
        optimizers.append(torch.optim.Muon(groups, lr=settings.muon_lr, adjust_lr_fn="original"))
    groups = _groups(trainable, decayed - muon_names, factors, settings.peak_lr, settings.weight_decay)
    groups += _groups(trainable, trainable.keys() - decayed, factors, settings.peak_lr, 0.0)
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
        optimizers.append(torch.optim.AdamW(groups, lr=settings.peak_lr, betas=settings.betas, fused=fused))
    return optimizers


def lr_factors(model: nn.Module, by_part: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate of every parameter, by name. ValueError for a part that the model lacks."""
    modules = dict(model.named_modules())
    for part in by_part:
        if part not in modules:
            children = ", ".join(dict(model.named_children()))
            raise ValueError(f"optim.lr_factors names {part!r}, which the model lacks; it has {children}")
    parts = sorted(by_part, key=len, reverse=True)
    names = [name for name, _ in model.named_parameters()]
    return {name: next((by_part[part] for part in parts if name.startswith(f"{part}.")), 1.0) for name in names}


def _groups(
    trainable: Mapping[str, nn.Parameter], names: Set[str], factors: Mapping[str, float], peak_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of `names`, one for each factor and each way of sharing them."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        if name in names:
            by_factor.setdefault(factors[name], []).append(parameter)
    rates = [(peak_lr * factor, group) for factor, parameters in by_factor.items() for group in by_mesh(parameters)]
    return [{"params": group, "weight_decay": weight_decay, "peak_lr": rate} for rate, group in rates]


def _decayed_names(model: nn.Module) -> set[str]:
    """Weights of linear and convolution layers that are not shared with an embedding table (tied heads)."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and id(module.weight) not in tables
    }
    return {name for name, p in model.named_parameters() if id(p) in weights and p.ndim >= 2}


def _muon_names(model: nn.Module) -> set[str]:
    """Linear weights inside the repeated layers of `backbone`, and near-square ones in those of `diffusion_head`."""
    children = dict(model.named_children())
    chosen: set[int] = set()
    for child, max_aspect in (("backbone", float("inf")), ("diffusion_head", HEAD_MATRIX_MAX_ASPECT)):
        if child not in children:
            continue
        layers = [module for module in children[child].modules() if isinstance(module, nn.ModuleList)]
        for module in (inner for layer in layers for inner in layer.modules()):
            if isinstance(module, nn.Linear) and max(module.weight.shape) <= max_aspect * min(module.weight.shape):
                chosen.add(id(module.weight))
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def lr_factor(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Factor on every group's `peak_lr` for optimiser step `step` (from 0): linear warm-up, constant, linear or cosine decay."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay_steps = max(1.0, settings.decay_fraction * num_steps)
    remaining = min(1.0, max(0, num_steps - step) / decay_steps)
    if settings.decay == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    return warmup * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * remaining)


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def start_ema(model: nn.Module) -> dict[str, Tensor]:
    """The moving average of the trainable parameters, by name, starting at their present values."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move `ema` towards the weights after step `step` (from 0); early steps forget faster, as (1 + t) / (10 + t)."""
    parameters = dict(model.named_parameters())
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average([local_value(tensor) for tensor in ema.values()], [local_value(parameters[name].detach()) for name in ema], None)


@contextmanager
def averaged(model: nn.Module, ema: dict[str, Tensor]) -> Iterator[nn.Module]:
    """The model with the averaged weights in eval mode; the training weights and mode come back bit for bit."""
    parameters = {name: p for name, p in model.named_parameters() if name in ema}
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(ema[name])
    model.eval()
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])
        for module, mode in modes.items():
            module.training = mode
