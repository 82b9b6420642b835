"""Tensor parallelism: the linear layers of the backbone's layers, each split over a few processes by the plan of `transformers`.

The processes are a mesh (data, tensor). Those of one tensor group hold parts of the same layers, run the same lanes and draw the
same noise; all that the plan does not name (embeddings, soft VQ, heads) is computed by each of them alike.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from orthus.training.settings import RunSettings

# The style of each name that a plan may hold. Norms between split layers see their own heads only: their gradients are parts of a
# sum, as those of a norm are that sees its own part of a sequence.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": lambda: SequenceParallel(use_local_output=True),
}
# For backbones without one. Chameleon's norms have weights for each head, so they get all heads.
PLANS = {
    "chameleon": {
        **{f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
}


def make_mesh(run: RunSettings) -> DeviceMesh | None:
    """The processes as (data, tensor); None where layers stay whole. ValueError where they cannot be arranged so."""
    size = run.tensor_parallel
    if size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"run.tensor_parallel={size} needs processes to split layers over; start with torchrun, or leave it out")
    if dist.get_world_size() % size:
        raise ValueError(f"{dist.get_world_size()} processes are no multiple of run.tensor_parallel={size}; start as many as are")
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh(torch.device(run.device).type, shape, mesh_dim_names=("data", "tensor"))


def data_group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The processes that between them run all lanes once; None for all processes."""
    return None if mesh is None else mesh.get_group("data")


def reads_data(mesh: DeviceMesh | None) -> bool:
    """Whether this process has loaders: the first of each tensor group reads for the others."""
    return mesh is None or mesh.get_local_rank("tensor") == 0


def shared_batches(batches: dict[int, Any], mesh: DeviceMesh | None) -> dict[int, Any]:
    """The batches, by lane, of this tensor group, in the process that has read them and in the others."""
    if mesh is None:
        return batches
    box = [batches]
    dist.broadcast_object_list(box, group=mesh.get_group("tensor"), group_src=0, device=torch.device("cpu"))
    return box[0]


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave in this process its parts of the backbone's linear layers, as DTensors over the tensor group. ValueError as
    [`layer_styles`]."""
    styles = layer_styles(model, mesh["tensor"].size())
    backbone: Any = model.backbone
    trains = {name: p.requires_grad for name, p in backbone.named_parameters()}
    plan = {name: STYLES[style]() for name, style in styles.items()}
    parallelize_module(backbone, mesh["tensor"], plan, src_data_rank=None)  # every process has the whole weights already
    for name, p in backbone.named_parameters():
        p.requires_grad_(trains[name])


def part_of(model: nn.Module, num_parts: int) -> nn.Module:
    """A copy of a model (on the meta device) whose split layers have the sizes of what one process holds; the model itself for
    one part. ValueError as [`layer_styles`]."""
    if num_parts == 1:
        return model
    part = copy.deepcopy(model)
    for name, style in layer_styles(model, num_parts).items():
        module = cast(nn.Module, part.backbone).get_submodule(name)
        for kind, p in module.named_parameters(recurse=False):
            shape = list(p.shape)
            if style.startswith("colwise"):
                shape[0] //= num_parts
            elif style.startswith("rowwise") and kind == "weight":
                shape[1] //= num_parts
            module.register_parameter(kind, nn.Parameter(p.new_empty(shape), requires_grad=p.requires_grad))
    return part


def head_parts(model: nn.Module, num_parts: int) -> int:
    """Into how many parts attention itself is split: 1 where a plan gathers all heads in every process. ValueError as
    [`layer_styles`]."""
    if num_parts > 1 and "colwise_gather_output" in layer_styles(model, num_parts).values():
        return 1
    return num_parts


def layer_styles(model: nn.Module, num_parts: int) -> dict[str, str]:
    """The style of each module of `model.backbone` that its plan names.

    Raises ValueError for a backbone without a plan, a style that is not in `STYLES`, and heads or layers that cannot be split
    into `num_parts` equal ones.
    """
    backbone = getattr(model, "backbone", None)
    config = getattr(backbone, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    plan = getattr(config, "base_model_tp_plan", None) or PLANS.get(kind)
    remedy = "use run.tensor_parallel=1, and run.sharding=full to share the weights"
    if backbone is None or not plan:
        raise ValueError(f"there is no tensor-parallel plan for the backbone {kind!r}; {remedy}")
    named = [name for name, _ in (*backbone.named_modules(), *backbone.named_parameters())]
    styles = {name: plan[pattern] for name in named if (pattern := re.sub(r"\b\d+\b", "*", name)) in plan}
    for name, style in styles.items():
        if style not in STYLES:
            known = ", ".join(STYLES)
            raise ValueError(f"the plan of the backbone {kind!r} wants {name} {style!r}, which is none of {known}; {remedy}")
    _check_heads(config, kind, num_parts)
    _check_layers(backbone, styles, kind, num_parts, remedy)
    return styles


def _check_heads(config: Any, kind: str, num_parts: int) -> None:
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % num_parts or keys % num_parts:
        raise ValueError(f"run.tensor_parallel={num_parts} does not divide the {heads} heads and {keys} key-value heads of the "
                         f"backbone {kind!r}; give a divisor of {math.gcd(heads, keys)}")  # fmt: skip


def _check_layers(backbone: nn.Module, styles: dict[str, str], kind: str, num_parts: int, remedy: str) -> None:
    """Linear layers of sizes that can be split, and nothing with weights among split values that the plan leaves out."""
    for name, style in styles.items():
        if not style.startswith(("colwise", "rowwise")):
            continue
        module = backbone.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} of the backbone {kind!r} is a {type(module).__name__} and no linear layer; {remedy}")
        size = module.out_features if style.startswith("colwise") else module.in_features
        if size % num_parts:
            raise ValueError(f"run.tensor_parallel={num_parts} does not divide the {size} values at {name} of the backbone "
                             f"{kind!r}; give a divisor of them")  # fmt: skip
    for parent in dict.fromkeys(name.rpartition(".")[0] for name, style in styles.items() if style == "colwise"):
        for name, _ in backbone.get_submodule(parent).named_parameters(prefix=parent):
            if name.rpartition(".")[0] not in styles:
                raise ValueError(f"the plan of the backbone {kind!r} leaves {name} out; {remedy}, or a newer transformers")
