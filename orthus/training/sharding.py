"""Sharding over processes with FSDP2, and what else changes how a model runs but not what it computes.

A sharded run computes the same losses and gradients as an unsharded one. Every parameter belongs to a layer of the backbone or to
the root, which stays gathered from its forward to its backward: embeddings, soft VQ and heads use each other's weights there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orthus.adapters import is_quantized
from orthus.training.settings import RunSettings


def prepare(model: nn.Module, run: RunSettings) -> None:
    """Checkpointed activations, compiled layers and sharding as `run` says, in place. ValueError for what cannot be."""
    if run.checkpoint_activations:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(f"{type(model).__name__} cannot checkpoint activations; leave run.checkpoint_activations out")
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.compile:
        for layer in backbone_layers(model):
            layer.compile()
    if run.sharding != "no":
        _shard(model, run)


def backbone_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of `model.backbone`. ValueError without."""
    lists = [module for module in getattr(model, "backbone", nn.Module()).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no backbone with layers; use run.sharding=no and run.compile=false")
    return max((list(layers) for layers in lists), key=len)


def _shard(model: nn.Module, run: RunSettings) -> None:
    if not dist.is_initialized():
        raise ValueError(f"run.sharding={run.sharding} needs processes to shard over; start with torchrun, or leave it out")
    if run.sample_every:
        raise ValueError(
            "run.sample_every draws with the whole model, which a sharded run never holds; set it to 0 and draw from final/"
        )
    if any(".lora_" in name for name, _ in model.named_parameters()) or any(map(is_quantized, model.parameters())):
        raise ValueError("adapters and integer weights are not sharded; use run.sharding=no, where only the adapters train")
    device = torch.device(run.device).type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    is_low = run.autocast == "bfloat16" and device == "cuda"
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if is_low else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=device == "cuda") if run.sharding == "offload" else OffloadPolicy()
    layers = backbone_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
    if any(p.requires_grad for name, p in model.named_parameters() if name.startswith(("backbone.", "latent_embedding."))):
        layers[0].register_forward_pre_hook(_require_gradient, with_kwargs=True, prepend=True)  # before FSDP's own hook
    # The root in fp32: latents, soft VQ and targets are computed in it, and autocast lowers its products.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), offload_policy=offload, reshard_after_forward=False)


def _require_gradient(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """All processes go through the layers backwards, also one whose embeddings are frozen and whose batch has no picture."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()


def loss_factor(model: nn.Module) -> int:
    """What makes up for the mean over processes that a sharded model takes of gradients, where the loss wants their sum."""
    return dist.get_world_size() if isinstance(model, FSDPModule) else 1


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def full_value(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def touch(model: nn.Module) -> Tensor | int:
    """0 that depends on all trainable parameters of the root of a sharded model, so that every process has gradients for the same
    ones and reduces them together, whatever kinds of targets its batch has. To be called after the forward."""
    if not isinstance(model, FSDPModule):
        return 0
    return cast(Tensor, sum(p.flatten()[:1].sum() * 0 for p in _trained_in_root(model)))


def reached(model: nn.Module, loss: Tensor | int) -> Tensor:
    """Which trainable parameters of the root of a sharded model a loss depends on, 0 or 1 each; empty for a whole model."""
    if not isinstance(model, FSDPModule):
        return torch.zeros(0)
    pending, seen, found = [getattr(loss, "grad_fn", None)], set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            pending += [following for following, _ in node.next_functions]
    return torch.tensor([float(id(p) in found) for p in _trained_in_root(model)])


def forget_touched(model: nn.Module, used: Tensor) -> None:
    """Take away the gradients that only [`touch`] made, so that optimisers leave these parameters alone, as they do unsharded.
    `used`: the largest of [`reached`] over the batches of this process."""
    if not isinstance(model, FSDPModule):
        return
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter, value in zip(_trained_in_root(model), used.tolist(), strict=True):
        if value == 0:
            parameter.grad = None


def root_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those outside of the backbone's layers."""
    inner = {id(p) for layer in backbone_layers(model) for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inner]


def _trained_in_root(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in root_parameters(model) if p.requires_grad]


@contextmanager
def whole(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Options for `save_pretrained` that hold all weights of a sharded model, in the first process; every process enters."""
    if not isinstance(model, FSDPModule):
        yield {}
        return
    is_first = dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = full_value(tensor)
        if is_first:
            gathered[name] = value.detach().cpu()
    yield {"state_dict": gathered}
