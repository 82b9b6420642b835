"""The published 7B layout at full size, with random weights: it loads without loss within weights + 1 shard, and answers.

Slow: `pytest -m slow tests/test_full_size.py -s` needs 20 GB of disk and 15 GiB of free memory for some minutes.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_files import published_config, shapes_of_7b
from test_published_layout import SIZES_OF_7B

SHARD_BYTES = 5_000_000_000
DISK, MEMORY = 20e9, 15 * 2**30

LOAD = """
import json, resource, sys, threading, time
import torch
from orthus.adapters import is_quantized, quantization
from orthus.modeling import OrthusForConditionalGeneration

def status():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmRSS")}

def watch():
    while not done.wait(0.02):
        for name, value in status().items():
            peak[name] = max(peak.get(name, 0), value)

def parts(tensor):
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if is_quantized(tensor) else [tensor]

folder, kind = sys.argv[1:]
options = {} if kind == "plain" else {"quantization_config": quantization(kind)}
before, peak, done = status(), {}, threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
times = [time.monotonic()]
model, report = OrthusForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
times.append(time.monotonic())
with torch.no_grad():
    output = model(input_ids=torch.tensor([[0, 16400, 16500, 8710]]))
    embedded = model.embed_image_latents(torch.randn(1, model.config.num_latents, model.config.head_config.latent_dim))
    drawn = model.diffusion_head.sample(output.last_hidden_state[:, -1], num_diffusion_steps=2)
    times.append(time.monotonic())
    tensors = [part for tensor in model.state_dict().values() for part in parts(tensor)]
    touched = sum(float(tensor.sum()) for tensor in tensors)  # what is mapped from the files is read when it is used
done.set()
watcher.join()
print(json.dumps({
    "report": {name: sorted(map(str, keys)) for name, keys in report.items()},
    "num_tensors": len(model.state_dict()), "num_bytes": sum(tensor.nbytes for tensor in tensors),
    "dtypes": sorted({str(p.dtype) for p in model.parameters()}), "devices": sorted({str(p.device) for p in model.parameters()}),
    "logits": [list(output.logits.shape), bool(output.logits.isfinite().all())],
    "embedded": [list(embedded.shape), bool(embedded.isfinite().all())], "drawn": bool(drawn.isfinite().all()),
    "taken": {name: peak[name] - before[name] for name in peak},
    "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before["VmRSS"],
    "seconds": {"load": times[1] - times[0], "forward": times[2] - times[1]},
}))
"""


def free_memory() -> int:
    """Bytes that processes could still take, by the kernel's own estimate."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 0
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def write_random_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict, shard_bytes: int) -> None:
    """A sharded bf16 checkpoint of these tensors, written one tensor at a time."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    generator = torch.Generator().manual_seed(0)
    files = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard.items():
            end = offset + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            for shape in shard.values():
                values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
                target.write(values.view(torch.uint8).numpy().data if values.ndim else bytes(2))
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def load_elsewhere(folder: Path, kind: str) -> dict:
    """What a fresh process reports that loads `folder` and uses it. Bytes are those taken since its imports."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", LOAD, str(folder), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict) -> None:
    assert found["report"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert (found["num_tensors"], found["dtypes"], found["devices"]) == (749, ["torch.bfloat16"], ["cpu"])
    assert (found["logits"], found["embedded"], found["drawn"]) == ([[1, 4, 65536], True], [[1, 1024, 4096], True], True)


@pytest.mark.slow
def test_the_7b_layout_loads_at_full_size_and_answers(tmp_path: Path) -> None:
    """Plain weights are mapped from the files, not copied: all that the process holds counts, file pages included. Quantised
    ones are copies, and the pages of the files that they came from can be dropped at any time: what counts is the rest."""
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"less than {DISK / 1e9:.0f} GB of disk free in {tmp_path}")
    if free_memory() < MEMORY:
        pytest.skip(f"less than {MEMORY / 2**30:.0f} GiB of memory free")
    shapes = shapes_of_7b()
    try:
        write_random_checkpoint(tmp_path, shapes, {**published_config(), **SIZES_OF_7B}, SHARD_BYTES)
        shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        found = {kind: load_elsewhere(tmp_path, kind) for kind in ("plain", "int8")}
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    print(json.dumps({**found, "largest_shard": shard}, indent=1))
    for kind in found:
        check(found[kind])
    plain, int8 = found["plain"], found["int8"]
    assert plain["num_bytes"] == 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == 2 * 7_134_462_595
    assert plain["max_rss"] <= plain["num_bytes"] + shard
    assert int8["num_bytes"] < 0.6 * plain["num_bytes"]
    assert int8["taken"]["RssAnon"] <= int8["num_bytes"] + shard
