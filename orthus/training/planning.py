"""What a run will take, from a model on the meta device and the settings: parameters, memory, arithmetic, disk.

"Exact" means equal to what the run holds. The rest are estimates: matrix products to a tenth, what autograd keeps to a quarter
(tests/test_planning.py measures both on the small model). Nothing here reads data or weights. Memory is that of one process.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from orthus.configuration import OrthusConfig
from orthus.conversion import config_from_published, is_published
from orthus.modeling import OrthusForConditionalGeneration
from orthus.text_head import MAX_LOGIT_BYTES
from orthus.training import operations
from orthus.training.optim import build_optimizers
from orthus.training.settings import OptimSettings, RunSettings
from orthus.training.sharding import backbone_layers, root_parameters
from orthus.training.step import loss_weights
from orthus.training.tensor_parallel import head_parts, part_of

if TYPE_CHECKING:
    from orthus.training.stages import DataSettings

GIB = 2**30
COPY = "copy of a checkpoint"
AROUND_PICTURE, AROUND_EXAMPLE = 2, 4  # begin and end of image; <s>, a token of the user's, a separator for each turn
PICTURES = {"t2i": 1, "vqa": 1, "describe": 1, "edit": 2, "story": 2}  # in the shortest example of a task of the small world
PICTURES_OF_KIND = {"text": 0, "editing": 2}  # of a kind of source; 1 for others
TFLOPS = {"cuda": 125.0, "cpu": 0.05}  # per process: 40 % of an A100's 312 in bfloat16; one core
BUILT = "the --output of `train.build` (of a Chameleon: --backbone leloy/Anole-7b-v0.1-hf), or a downloaded Orthus; make one"


@dataclass(frozen=True)
class Hardware:
    """What `--dry-run` assumes. None: processes as torchrun says, else one (or tensor group) for each lane if sharded, else one;
    memory (GiB for each process) of this machine; throughput as in `TFLOPS`."""

    processes: int | None = None
    memory: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("processes", "memory", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value} is not above 0")


def requested(argv: Sequence[str]) -> tuple[list[str], Hardware | None]:
    """The arguments of the stage, and what a dry run is to assume, None for a real run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--tflops", type=float)
    found, rest = parser.parse_known_args(list(argv))
    hardware = Hardware(found.processes, found.memory, found.tflops)
    if not found.dry_run and hardware != Hardware():
        raise ValueError(f"{hardware} is for a plan; add --dry-run, or leave --processes, --memory and --tflops out")
    return rest, hardware if found.dry_run else None


def config_in(folder: str) -> OrthusConfig:
    """The config of a model folder, ours or published, from its config.json alone. ValueError without."""
    raw = read_config(folder, BUILT)
    if not is_published(raw) and raw.get("model_type") != OrthusConfig.model_type:
        raise ValueError(f"{folder} is of model_type {raw.get('model_type')!r}; give the folder of an Orthus or Chameleon")
    return OrthusConfig.from_dict(config_from_published(raw, {}) if is_published(raw) else raw)


def read_config(folder: str, origin: str) -> dict[str, Any]:
    """The parsed config.json of a folder. ValueError without, which says where such a folder comes from."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}. {folder} is `final/` of an earlier stage's run.output_dir, {origin}")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return raw


def meta_model(config: OrthusConfig, keeps_dtype: bool = False) -> OrthusForConditionalGeneration:
    """A model without storage, in fp32 as stages load it, or in the dtype that it is stored in, which adapters keep."""
    with torch.device("meta"):
        model = OrthusForConditionalGeneration(config)
    dtype = (keeps_dtype and config.dtype) or torch.float32
    return cast(Any, model).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def parameter_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Exact: by group, all parameters and the trainable ones. A tied LM head counts with the embeddings."""
    table = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    names = {"latent_embedding": "embeddings, codebook", "lm_head": "LM head", "diffusion_head": "diffusion head"}
    counts = {group: (0, 0) for group in ("backbone", *names.values(), "autoencoder")}
    for name, p in model.named_parameters():
        child = name.partition(".")[0]
        group = "embeddings, codebook" if id(p) in table else names.get(child, child)
        total, trainable = counts.get(group, (0, 0))
        counts[group] = (total + p.numel(), trainable + p.numel() * p.requires_grad)
    return counts


def state_bytes(model: nn.Module, run: RunSettings, optim: OptimSettings, processes: int) -> dict[str, int]:
    """Exact for AdamW: what a process keeps from step to step; sharded, the largest share of cuts along dimension 0 (of its parts
    of layers, where they are split)."""
    shards = 1 if run.sharding == "no" else processes // run.tensor_parallel
    model = part_of(model, run.tensor_parallel)
    trainable = sum(_share(p, shards) for p in model.parameters() if p.requires_grad)
    weights = sum(_share(p, shards) for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    slots, averages = 0, trainable if run.ema_decay else 0
    for optimizer in build_optimizers(model, optim):
        is_adamw = isinstance(optimizer, torch.optim.AdamW)  # two moments and a counter in fp32; Muon: one momentum
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            slots += 2 * _share(p, shards) + 4 if is_adamw else _share(p, shards)
    return {"weights": weights, "gradients": trainable, "optimiser states": slots, "averaged weights (EMA)": averages}


def copied_bytes(model: nn.Module, run: RunSettings, optim: OptimSettings, processes: int) -> int:
    """Estimate: of the copy in the CPU's memory from which a checkpoint is written while training goes on. Weights that do not
    train are not copied, and of tensors that all processes hold each copies a part."""
    if not run.async_checkpoints:
        return 0
    kept = state_bytes(model, run, optim, processes)
    copied = kept["gradients"] + kept["optimiser states"] + kept["averaged weights (EMA)"]  # a gradient is as large as its weight
    return copied if run.shares_weights else -(-copied // processes)


def _share(tensor: Tensor, shards: int) -> int:
    if shards == 1 or tensor.ndim == 0:
        return tensor.nbytes
    return -(-tensor.shape[0] // shards) * (tensor.numel() // max(tensor.shape[0], 1)) * tensor.element_size()


def _compute_size(model: nn.Module, run: RunSettings) -> int:
    """Bytes of a number in matrix products."""
    return 2 if run.autocast == "bfloat16" else next(model.parameters()).element_size()


def _is_low(run: RunSettings) -> bool:
    """Whether the sharded model itself computes in bfloat16, so that the residual stream is in it too."""
    return run.sharding != "no" and run.autocast == "bfloat16" and run.device.startswith("cuda")


def passing_bytes(model: Any, run: RunSettings, processes: int) -> int:
    """Estimate: copies of weights in which a step computes, and the buffers in which gradients are summed over processes."""
    model = part_of(model, run.tensor_parallel)
    if run.sharding != "no":
        parts = [root_parameters(model), list(backbone_layers(model)[0].parameters())]
        whole, learned = ([sum(p.numel() for p in part if p.requires_grad or every) for part in parts] for every in (True, False))
        size = 2 if _is_low(run) else next(model.parameters()).element_size()
        return size * (whole[0] + 2 * whole[1]) + (size + 4) * sum(learned)  # two layers: the next is fetched early
    table = {id(p) for p in model.get_input_embeddings().parameters()}
    outside = ("autoencoder.", "latent_embedding.")
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in table and not name.startswith(outside)]
    copies = sum(2 * p.numel() for p in matrices if p.element_size() > 2) if run.autocast == "bfloat16" else 0
    return copies + (4 * sum(p.numel() for p in model.parameters() if p.requires_grad) if processes > 1 else 0)


def layer_bytes_per_token(config: Any, residual: int, size: int, parts: int = 1, head_parts: int = 1) -> int:
    """Estimate: what autograd keeps of one layer: two norms, query, key, value, attention's output, and a gated MLP. `parts`:
    into which the MLP is split, `head_parts`: attention."""
    hidden, (queries, keys) = config.hidden_size, operations.attention_widths(config)
    norms = 2 * (4 + residual + size) * hidden
    attention = size * (2 * queries + 2 * keys) + (size * (queries + keys) if config.model_type == "chameleon" else 0)
    return norms + attention // head_parts + 4 * size * int(getattr(config, "intermediate_size", None) or 4 * hidden) // parts


def activation_bytes(
    model: OrthusForConditionalGeneration, data: DataSettings, run: RunSettings, attention: str, is_checkpointed: bool
) -> int:
    """Estimate: what autograd keeps of one lane's batch, whose rows are as full of pictures as they can be, without logits. Where
    layers do not train it is less. Encoding pictures comes before and is over by then: the larger of the two counts."""
    config, head = model.config, model.config.head_config
    text, rows, length = config.text_config, data.rows_per_batch, data.row_length
    num_tokens, num_images = rows * length, images_per_batch(config, data)
    size, is_low = _compute_size(model, run), _is_low(run)
    residual = 2 if is_low else next(model.parameters()).element_size()
    of_heads = head_parts(model, run.tensor_parallel)
    per_layer = num_tokens * layer_bytes_per_token(text, residual, size, run.tensor_parallel, of_heads)
    if attention == "eager":
        per_layer += rows * text.num_attention_heads // of_heads * length**2 * (size + 4)
    num_layers, stream = len(backbone_layers(model)), num_tokens * text.hidden_size * residual
    layers = num_layers * stream + per_layer if is_checkpointed else num_layers * per_layer
    mask = rows * length**2 * size
    num_latents = num_images * config.num_latents
    per_draw = size * head.width * (10 * head.num_blocks + 8)
    codes = {"softmax": 12 + size, "argmin": 0, "linear": 0}[config.latent_embedding] * config.num_codes
    used = layers + mask + 4 * stream + num_latents * (head.num_noise_draws * per_draw + codes)
    if data.latents is not None:
        return used
    channels = getattr(config.autoencoder_config, "base_channels", None) or 8
    return max(used, 3 * 4 * num_images * channels * int(config.autoencoder_config.image_size) ** 2)


def logit_bytes(model: OrthusForConditionalGeneration, data: DataSettings, run: RunSettings) -> int:
    """Estimate: logits, their logarithms and gradients in fp32 and as computed, for as many positions as are taken at once."""
    vocab_size = model.lm_head.out_features
    num = min(data.rows_per_batch * data.row_length, max(1, MAX_LOGIT_BYTES // (4 * vocab_size)))
    return num * vocab_size * (3 * 4 + 2 * _compute_size(model, run))


def pictures_in_an_example(data: DataSettings) -> int:
    """Pictures of the shortest example with the most pictures that the data is sure to bring."""
    tasks = [PICTURES.get(task, 0) for task, weight in data.tasks.items() if weight > 0]
    return max(tasks + [PICTURES_OF_KIND.get(source.kind, 1) for source in data.sources], default=0)


def images_per_batch(config: Any, data: DataSettings) -> int:
    """At most, in one lane's batch: examples of one picture each, with as little text as can be."""
    if not pictures_in_an_example(data):
        return 0
    return data.rows_per_batch * max(1, data.row_length // (config.num_latents + AROUND_PICTURE + AROUND_EXAMPLE))


def flops_per_step(
    model: OrthusForConditionalGeneration,
    data: DataSettings,
    run: RunSettings,
    lanes: int,
    num_images: int | None = None,
    num_parts: int = 1,
) -> dict[str, float]:
    """Estimate by part, as [`operations.flops`], with attention over whole rows and every token a target. `num_images`: of all
    lanes; default: as many as there can be. `num_parts`: of one process of so many that split the layers between them."""
    num_tokens = lanes * data.rows_per_batch * data.row_length
    num_images = lanes * images_per_batch(model.config, data) if num_images is None else num_images
    num_latents = num_images * model.config.num_latents
    work = operations.Work(num_tokens, num_tokens * data.row_length / head_parts(model, num_parts), num_images,
                           max(num_tokens - num_latents, 0), num_latents)  # fmt: skip
    part = cast(OrthusForConditionalGeneration, part_of(model, num_parts))
    return operations.flops(part, work, data.latents is None, run.checkpoint_activations)


def resolve(run: RunSettings, hardware: Hardware) -> tuple[int, int]:
    """Processes and lanes. ValueError for numbers with which `fit` would refuse to start."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    size = run.tensor_parallel
    planned = size * ((run.lanes or 1) if run.sharding != "no" else 1)
    processes = hardware.processes or (launched if launched > 1 else planned)
    if processes % size:
        raise ValueError(f"{processes} processes are no multiple of run.tensor_parallel={size}; give --processes that are")
    groups = processes // size
    lanes = run.lanes or groups
    if lanes % groups:
        shared, times = (f"{processes} processes", "") if size == 1 else (f"{groups} groups of {size} processes", f"{size} x ")
        raise ValueError(f"{lanes} lanes cannot be shared by {shared}; set run.lanes to a multiple of {groups}, "
                         f"or --processes to {times}a number that divides {lanes}")  # fmt: skip
    if run.sharding != "no" and processes == 1:
        raise ValueError(f"run.sharding={run.sharding} needs processes to shard over; give --processes above 1, or sharding=no")
    return processes, lanes


def check_rows(config: Any, data: DataSettings) -> None:
    """ValueError for rows that hold no example with its pictures, or that are longer than the backbone's positions."""
    pictures = pictures_in_an_example(data)
    needed = pictures * (config.num_latents + AROUND_PICTURE) + AROUND_EXAMPLE
    if data.row_length < needed:
        raise ValueError(f"data.row_length={data.row_length} is too short: {pictures} x {config.num_latents} latents "
                         f"with the least text take {needed} tokens; raise it to {needed} + your texts")  # fmt: skip
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None and data.row_length > limit:
        raise ValueError(f"data.row_length={data.row_length} exceeds the {limit} positions of the backbone; lower it to {limit}")


def present_memory(run: RunSettings, processes: int) -> tuple[int, str]:
    """Bytes for each process on this machine, and what they are: the GPU's, or a share of the RAM."""
    if run.device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // (processes if run.device == "cpu" else 1), "this machine's RAM"


def dry_run(
    model: OrthusForConditionalGeneration,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    attention: str,
    hardware: Hardware,
) -> None:
    """Print what the run will take. ValueError if it cannot start, or (after printing) if it does not fit."""
    processes, lanes = resolve(run, hardware)
    check_rows(model.config, data)
    loss_weights(model, run)
    for line in (*_parameter_lines(model), *_work_lines(model, data, run, processes, lanes, hardware)):
        print(line)
    kept, passing = state_bytes(model, run, optim, processes), passing_bytes(model, run, processes)
    activations = {flag: activation_bytes(model, data, run, attention, flag) for flag in (True, False)}
    taken = {**kept, "copies and sums of weights": passing, "logits": logit_bytes(model, data, run)}
    taken["activations"] = activations[run.checkpoint_activations]
    hosted = [name for name in kept if run.sharding == "offload"]
    if run.async_checkpoints:
        taken[COPY] = copied_bytes(model, run, optim, processes)
        hosted += [COPY] if run.device != "cpu" else []
    used = sum(size for name, size in taken.items() if name not in hosted)
    memory, place = present_memory(run, processes)
    if hardware.memory is not None:
        memory, place = int(hardware.memory * GIB), "--memory"
    print(f"\nmemory of each of {processes} processes, sharding={run.sharding}, tensor_parallel={run.tensor_parallel}, in GiB")
    for name, size in taken.items():
        estimate = "" if name in kept else "  (estimate)"
        print(f"  {name:<28}{size / GIB:>9.2f}{estimate}{'  in the RAM' if name in hosted else ''}")
    others = "without" if run.checkpoint_activations else "with"
    print(f"  all{used / GIB:>34.2f}  of {memory / GIB:.1f} ({place}); {others} run.checkpoint_activations activations take "
          f"{activations[not run.checkpoint_activations] / GIB:.2f}")  # fmt: skip
    _print_disk(model, run, optim)
    if used > memory:
        raise ValueError(
            f"{used / GIB:.1f} GiB do not fit in {memory / GIB:.1f} GiB ({place}); {_remedy(run, data)}, or plan for another "
            "device with --memory GIB"
        )


def _parameter_lines(model: OrthusForConditionalGeneration) -> list[str]:
    counts = parameter_counts(model)
    counts["all"] = (sum(total for total, _ in counts.values()), sum(trainable for _, trainable in counts.values()))
    lines = [f"{'parameters':<24}{'all':>16}{'trainable':>16}"]
    lines += [f"  {group:<22}{total:>16,}{trainable:>16,}" for group, (total, trainable) in counts.items()]
    low = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.element_size() < 4})
    if low:
        lines.append(f"  note: weights train in {', '.join(low)}, which loses small updates; build with --dtype float32")
    return lines


def _work_lines(model: Any, data: DataSettings, run: RunSettings, processes: int, lanes: int, hardware: Hardware) -> list[str]:
    rows = lanes * data.rows_per_batch
    flops = flops_per_step(model, data, run, lanes)
    total, device = sum(flops.values()), "cuda" if run.device.startswith("cuda") else "cpu"
    tflops = hardware.tflops or TFLOPS[device]
    one_of_each_group = flops_per_step(model, data, run, lanes, num_parts=run.tensor_parallel)
    seconds = sum(one_of_each_group.values()) / (processes // run.tensor_parallel * tflops * 1e12)
    by_part = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in flops.items())
    images = lanes * images_per_batch(model.config, data)
    source = "--tflops" if hardware.tflops else {"cuda": "40 % of an A100's peak", "cpu": "one core"}[device] + ", assumed"
    return [
        f"\nan optimiser step: {rows} rows ({lanes} lanes of {data.rows_per_batch}) of {data.row_length} = "
        f"{rows * data.row_length:,} tokens, up to {images} images",
        f"  {total / 1e12:.4g} TFLOP ({by_part})",
        f"  {seconds:.3g} s with {processes} processes at {tflops:g} TFLOP/s each ({source}); {run.num_steps:,} steps: "
        f"{seconds * run.num_steps / 3600:.3g} h, {seconds * run.num_steps * processes / 3600:.3g} process-hours",
    ]


def _print_disk(model: OrthusForConditionalGeneration, run: RunSettings, optim: OptimSettings) -> None:
    whole = state_bytes(model, replace(run, sharding="no", tensor_parallel=1), optim, 1)
    checkpoint = sum(size for name, size in whole.items() if name != "gradients")
    most = (run.keep_checkpoints + 1) * checkpoint + whole["weights"]
    print(f"\ndisk, in GiB: a checkpoint {checkpoint / GIB:.2f}, final/ {whole['weights'] / GIB:.2f}; at most {most / GIB:.2f} "
          f"with {run.keep_checkpoints} checkpoints kept and one being written")  # fmt: skip


def _remedy(run: RunSettings, data: DataSettings) -> str:
    """The first of the usual ways to need less that is not taken yet."""
    ways = {
        "set run.checkpoint_activations=true": run.checkpoint_activations,
        f"lower data.rows_per_batch from {data.rows_per_batch} and raise run.lanes": data.rows_per_batch == 1,
        "set run.sharding=full": run.sharding != "no",
        "give more processes": run.sharding == "offload",
        "set run.sharding=offload": run.sharding == "offload",
        "set run.async_checkpoints=false": not run.async_checkpoints or run.device != "cpu",
    }
    return next((way for way, is_taken in ways.items() if not is_taken), "lower data.row_length or take a smaller model")
