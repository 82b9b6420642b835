"""Sharding over processes with FSDP2, and what else changes how a model runs but not what it computes.

A sharded run computes the same losses and gradients as an unsharded one, also with layers that are split (`tensor_parallel.py`):
shards are then taken over the data dimension of the processes' mesh. Every parameter belongs to a layer of the backbone or to
the root, which stays gathered from its forward to its backward: embeddings, soft VQ and heads use each other's weights there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orthus.adapters import is_quantized
from orthus.training.settings import RunSettings
from orthus.training.tensor_parallel import split_layers


def prepare(model: nn.Module, run: RunSettings, mesh: DeviceMesh | None = None) -> None:
    """Checkpointed activations, compiled, split and sharded layers as `run` says, in place. ValueError for what cannot be.

    mesh: of the processes, (data, tensor), where layers are split.
    """
    if run.checkpoint_activations:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(f"{type(model).__name__} cannot checkpoint activations; leave run.checkpoint_activations out")
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.compile:
        for layer in backbone_layers(model):
            layer.compile()
    if mesh is not None:
        _check_divisible(model, run)
        split_layers(model, mesh)
    if run.sharding != "no":
        _shard(model, run, mesh)


def backbone_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of `model.backbone`. ValueError without."""
    lists = [module for module in getattr(model, "backbone", nn.Module()).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no backbone with layers; use run.sharding=no and run.compile=false")
    return max((list(layers) for layers in lists), key=len)


def _check_divisible(model: nn.Module, run: RunSettings) -> None:
    is_adapted = any(".lora_" in name for name, _ in model.named_parameters())
    check_shared_weights(run, is_adapted, any(map(is_quantized, model.parameters())))


def check_shared_weights(run: RunSettings, is_adapted: bool, has_integers: bool) -> None:
    """ValueError for what a run cannot do that shares weights over processes, if it does. `is_adapted`: has adapters;
    `has_integers`: as weights."""
    if not run.shares_weights:
        return
    is_split = run.tensor_parallel > 1
    wish = f"run.tensor_parallel={run.tensor_parallel}" if is_split else f"run.sharding={run.sharding}"
    if run.sample_every:
        raise ValueError(
            f"run.sample_every draws with the whole model, which no process holds with {wish}; set it to 0 and draw from final/"
        )
    if has_integers:
        raise ValueError(f"integer weights are not sharded or split ({wish}); use run.sharding=no and run.tensor_parallel=1")
    if is_split and is_adapted:
        raise ValueError(
            f"layers with adapters are not split ({wish}); use run.tensor_parallel=1, and run.sharding=full to shard them"
        )


def _shard(model: nn.Module, run: RunSettings, mesh: DeviceMesh | None) -> None:
    if not dist.is_initialized():
        raise ValueError(f"run.sharding={run.sharding} needs processes to shard over; start with torchrun, or leave it out")
    _check_divisible(model, run)
    device = torch.device(run.device).type
    mesh = init_device_mesh(device, (dist.get_world_size(),)) if mesh is None else mesh["data"]
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


def loss_factor(model: nn.Module, run: RunSettings) -> int:
    """What makes up for the mean over processes that a sharded model takes of gradients, where the loss wants their sum."""
    return dist.get_world_size() // run.tensor_parallel if isinstance(model, FSDPModule) else 1


def full_value(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_value(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Sum the gradients over the processes of `group`, None for all; a parameter without a gradient in every process keeps none.
    A sharded model has done so in its backward."""
    if isinstance(model, FSDPModule):
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(has_gradient, group=group)
    used = [p for p, has in zip(parameters, has_gradient.tolist(), strict=True) if has]
    if not used:
        return
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if isinstance(p, DTensor):  # of norms, each process of a tensor group has a part of the sum
            p.grad = cast(DTensor, p.grad).redistribute(placements=p.placements)
    local = [local_value(cast(Tensor, p.grad)) for p in used]
    flat = torch.cat([gradient.flatten().float() for gradient in local])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(local, flat.split([gradient.numel() for gradient in local]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in groups that one call may work on: those that are shared in the same way."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return list(groups.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients, of the whole tensors, 0 without any; every process calls this."""
    gradients = [[p.grad for p in group if p.grad is not None] for group in by_mesh(parameters)]
    norms = [full_value(nn.utils.get_total_norm(group)) for group in gradients if group]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


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
    """Options for `save_pretrained` that hold all weights of a shared model, in the first process; every process enters."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        yield {}
        return
    is_first = dist.get_rank() == 0
    named = model.state_dict(keep_vars=True)  # tied weights are one tensor, and stay one
    gathered: dict[int, Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in gathered:
            value = full_value(tensor.detach())
            gathered[id(tensor)] = value.cpu() if is_first else value.new_empty(0)
    yield {"state_dict": {name: gathered[id(tensor)] for name, tensor in named.items()} if is_first else {}}
