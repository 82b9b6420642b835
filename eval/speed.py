"""How fast latents are drawn, side by side in one run with a plain loop that does per step what the published code does.

`python -m eval.speed --preset cpu-mid --json runs/speed.json` prints a table and writes all numbers with where they come from;
`--model FOLDER` measures a checkpoint instead of random weights.
"""

import argparse
import copy
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.provenance import commit, weights_hash
from eval.speed_clock import PARTS
from eval.speed_costs import bandwidth, floor_seconds, matrix_rate, sizes
from eval.speed_measure import DROPPED, Ceilings, Run, image_difference, measure
from eval.speed_presets import SEED, Preset, check_positions, find_preset, preset_config, random_model
from eval.whole_files import write_json
from orthus.diffusion import SOLVERS
from orthus.modeling import OrthusForConditionalGeneration

DTYPES = ("float32", "bfloat16", "float16")
METHOD = {
    "reference": "eval/reference_loop.py: batch of one, every latent embedded again for each stream, LM head at every position, "
    "one whole forward of the head and one step of a diffusers scheduler per diffusion step (DDIM 100; Euler for flow matching)",
    "ours": f"model.generate broken off after the measured latents; of each call {DROPPED} cycle after the prompt and the known "
    "latents counts as opening cost, not as seconds per latent",
    "names": "exact: preset='exact' (the published sampler); default: generate when nothing is said; grid: the named solver and "
    "number of diffusion steps",
    "positions": "per raster place: seconds in which every row of the batch gains a latent, mean over consecutive latents that "
    "end at that place, median over repeats; known latents are random; overhead is what is left of the total beside the parts",
    "seconds_per_image": "(prefill + trapezoid integral of seconds over raster places, constant beyond the first and last + "
    "autoencoder decode) / batch; prefill is all of a call that the latents measured at place 1 would not have taken: reading "
    "the prompt, packing weights, capturing graphs",
    "ratios": "seconds per image of the reference at batch 1 (measured first and last, the faster one counts) / of ours, same "
    "guidance; (exact_)ratio_batchN and "
    "bf16_ratio_batchN with preset='exact', the last with weights in the low dtype against the reference in the preset's",
    "position_ratio": "ours, batch 1, exact: seconds at the last raster place / at place 64 (else the first)",
    "max_abs_image_difference": "reference against exact at batch 1 from the same noise: the first num_compared latents of an "
    "image, the others zero, decoded; in units of pixels in [0, 1], not clipped",
    "costs": "counted from shapes: flops and cache_bytes are what the result needs; weight_bytes counts the sampler's weights "
    "once per pass and all others once; the sampler's may stay in a cache, so that bandwidth_fraction can exceed 1",
    "bandwidth_floor_ratio": "ours, batch 1, exact, last place: seconds / those in which every weight that a latent needs is "
    "read once at the measured bandwidth",
    "ceilings": "best of several: sum of a large fp32 tensor; product of two large square matrices per dtype",
    "peak_memory_bytes": "CUDA: most allocated during the configuration; CPU: largest resident set of the process so far",
    "weights": "random for presets; how many diffusion steps a look-ahead keeps depends on weights, so a trained model differs",
}


@dataclass(frozen=True)
class Settings:
    """The command line; None takes the preset's."""

    preset: str = "cpu-mid"
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    batch: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    solvers: tuple[str, ...] | None = None
    guidance: bool = True
    positions: tuple[int, ...] | None = None
    repeats: int | None = None
    ratios: bool = True
    json: str | None = None

    def __post_init__(self) -> None:
        find_preset(self.preset)
        for name in ("batch", "steps", "positions", "threads", "repeats"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if number < 1:
                    raise ValueError(f"{name}={number}; give at least 1")
        for solver in self.solvers or ():
            if solver not in SOLVERS:
                raise ValueError(f"solver {solver!r} is unknown; use some of {', '.join(SOLVERS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of whole numbers such as 1,4,16") from None


def parse(argv: Sequence[str]) -> Settings:
    """ValueError for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__)
    parser.add_argument("--preset", default="cpu-mid", help="tiny, cpu-mid or gpu-7b: a random model, and what is measured of it")
    parser.add_argument("--model", help="folder of a checkpoint, instead of random weights")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--batch", help="batch sizes measured besides those of the ratios: 1,4,16")
    parser.add_argument("--steps", help="numbers of diffusion steps of those: 10,100")
    parser.add_argument("--solvers", help="solvers of those: ddim,dpm++2m")
    parser.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--positions", help="raster places at which latents are timed: 1,64,256,1024; 1 is always among them")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--ratios", action=argparse.BooleanOptionalAction, default=True, help="measure what the ratios need")
    parser.add_argument("--json", help="file for the results")
    given = vars(parser.parse_args(argv))
    for name in ("batch", "steps", "positions"):
        given[name] = None if given[name] is None else _numbers(given[name])
    given["solvers"] = None if given["solvers"] is None else tuple(given["solvers"].split(","))
    return Settings(**given)


def load(settings: Settings, preset: Preset) -> OrthusForConditionalGeneration:
    """The checkpoint, or random weights, on its device. ValueError without that device."""
    device, dtype = torch.device(settings.device or preset.device), getattr(torch, settings.dtype or preset.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not available here; give --device cpu or another preset")
    if settings.model is None:
        return random_model(preset_config(settings.preset), device, dtype)
    model = OrthusForConditionalGeneration.from_pretrained(settings.model, dtype=dtype)
    return model.to(device).eval()


def places(settings: Settings, preset: Preset, num_latents: int) -> tuple[int, ...]:
    """Raster places to measure: those asked for, else those of the preset that an image has, and its last one."""
    if settings.positions is not None:
        check_positions(settings.positions, num_latents)
        return tuple(sorted(set(settings.positions)))
    return tuple(sorted({*(place for place in preset.positions if place <= num_latents), num_latents}))


def plan(settings: Settings, preset: Preset, num_latents: int) -> list[Run]:
    """All configurations; wide batches are measured at every other place, once."""
    dtype, repeats = settings.dtype or preset.dtype, settings.repeats or preset.repeats
    guidance, positions = (preset.guidance if settings.guidance else 1.0), places(settings, preset, num_latents)
    few = tuple(sorted({*positions[::2], positions[-1]}))

    def run(name: str, batch: int, **others: Any) -> Run:
        wide = batch > 4
        fields = {"dtype": dtype, "num_latents": preset.num_others, "repeats": 1 if wide else repeats, **others}
        return Run(name, batch, guidance, positions=few if wide else positions, **fields)

    batches, steps, solvers = preset.grid
    grid = [
        run("grid", batch, solver=solver, num_steps=num_steps)
        for batch in settings.batch or batches
        for num_steps in settings.steps or steps
        for solver in settings.solvers or solvers
    ]
    if not settings.ratios:
        return grid
    exact = [run("exact", batch, **({"num_latents": preset.num_latents} if batch == 1 else {})) for batch in preset.batches]
    low = run("exact", preset.low_batch, dtype=preset.low_dtype, num_latents=1)
    reference = run("reference", 1, num_latents=1)
    return [reference, *exact, run("default", 1), *grid, low, reference]


def measure_all(
    model: OrthusForConditionalGeneration, runs: Sequence[Run], ceilings: dict[str, Ceilings]
) -> Iterator[dict[str, Any]]:
    """The numbers of each configuration in turn; weights in another dtype are a copy."""
    models = {str(model.dtype).removeprefix("torch."): model}
    with tqdm(runs, unit="configuration") as bar:
        for run in bar:
            if run.dtype not in models:
                models[run.dtype] = copy.deepcopy(model).to(getattr(torch, run.dtype))
            yield measure(models[run.dtype], run, ceilings[run.dtype], bar.set_postfix_str)


def reference_seconds(found: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds per image of the reference loop, at the beginning of a run and at its end."""
    return [one["seconds_per_image"] for one in found if one["name"] == "reference"]


def summary(settings: Settings, preset: Preset, found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers at top level, from all configurations."""

    def of(name: str, batch: int, dtype: str | None = None) -> dict[str, Any]:
        wanted = (name, batch, dtype or settings.dtype or preset.dtype)
        return next(one for one in found if (one["name"], one["batch"], one["dtype"]) == wanted)

    reference, exact = min(reference_seconds(found)), of("exact", 1)["positions"]
    ratios = {f"exact_ratio_batch{batch}": reference / of("exact", batch)["seconds_per_image"] for batch in preset.batches}
    ratios |= {f"ratio_batch{batch}": ratios[f"exact_ratio_batch{batch}"] for batch in preset.batches if batch > 8}
    low = of("exact", preset.low_batch, preset.low_dtype)
    near, last = ("64" if "64" in exact else next(iter(exact))), list(exact)[-1]
    return {
        **ratios,
        f"bf16_ratio_batch{preset.low_batch}": reference / low["seconds_per_image"],
        "default_ratio_batch1": reference / of("default", 1)["seconds_per_image"],
        f"position_ratio_{last}_{near}": exact[last]["total"] / exact[near]["total"],
    }


def provenance(settings: Settings, model: OrthusForConditionalGeneration) -> dict[str, Any]:
    """Where the numbers come from: command, commit, weights, versions and hardware."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    names = output("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2") or platform.processor() or platform.machine()
    cuda = model.device.type == "cuda"
    return {
        "command": "python -m eval.speed " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "settings": vars(settings),
        "seed": SEED,
        "weights_sha256": weights_hash(Path(settings.model)) if settings.model else None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers") if find_spec(name)}
        | {"python": platform.python_version(), "cuda": torch.version.cuda if cuda else None},
        "hardware": {"cpu": names, "device": torch.cuda.get_device_name(model.device) if cuda else "cpu"},
        "threads": torch.get_num_threads(),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line per configuration: milliseconds per latent at each place, seconds per image."""
    lines = []
    for one in found:
        shown = "  ".join(f"{place}: {1000 * seconds:.4g}" for place, seconds in one["seconds_per_latent"].items())
        sampler = f"{one['name']} {one['solver'] or ''} {one['num_diffusion_steps']}"
        last = list(one["positions"].values())[-1]
        split = ", ".join(f"{part} {last[part] / last['total']:.0%}" for part in (*PARTS, "overhead"))
        what = f"{sampler:24s} batch {one['batch']:3d} {one['dtype']:9s} guidance {one['guidance']:g}"
        ceilings = f"{last['bandwidth_fraction']:.0%} of bandwidth, {last['rate_fraction']:.0%} of matrix rate"
        memory = f"{one['peak_memory_bytes'] / 2**30:.2f} GiB"
        lines.append(f"{what}  {one['seconds_per_image']:.4g} s per image; ms per latent at {shown}")
        lines.append(f"{'':24s} at the end {split}; {ceilings}; {memory}")
    return "\n".join(lines)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Load, measure and put everything into one dict."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    preset = find_preset(settings.preset)
    model = load(settings, preset)
    config, device = model.config, model.device
    runs = plan(settings, preset, config.num_latents)
    print("ceilings of the machine", file=sys.stderr)
    read = bandwidth(device, preset.bandwidth_bytes)
    rates = {dtype: matrix_rate(device, getattr(torch, dtype), preset.matrix_side) for dtype in {run.dtype for run in runs}}
    ceilings = {dtype: Ceilings(read, rate) for dtype, rate in rates.items()}
    found = list(measure_all(model, runs, ceilings))
    result: dict[str, Any] = {}
    if settings.ratios:
        print("pictures of the reference and ours", file=sys.stderr)
        guidance, compared = (preset.guidance if settings.guidance else 1.0), min(preset.num_compared, config.num_latents)
        result = {**summary(settings, preset, found)}
        exact = next(one for one in found if one["name"] == "exact" and one["batch"] == 1)
        last = list(exact["positions"].values())[-1]["total"]
        result["bandwidth_floor_ratio"] = last / floor_seconds(sizes(model), read)
        result["max_abs_image_difference"] = image_difference(model, guidance, compared)
        result["num_compared"] = compared
        result["reference_seconds_per_image"] = reference_seconds(found)
    return {
        **result,
        "preset": settings.preset,
        "ceilings": {"bandwidth_gb_per_s": read / 1e9, "gflop_per_s": {dtype: rate / 1e9 for dtype, rate in rates.items()}},
        "configurations": found,
        "method": METHOD,
        **provenance(settings, model),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    settings = parse(sys.argv[1:] if argv is None else list(argv))
    result = evaluate(settings)
    print(table(result["configurations"]))
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name}: {value:.4g}")
    if settings.json is not None:
        write_json(Path(settings.json), result)


if __name__ == "__main__":
    main()
