"""FID and KID between folders of pictures, CLIP score and preference scores of pictures with prompts.

`python -m eval.picture_metrics fid FOLDER_A FOLDER_B`
`python -m eval.picture_metrics clip FOLDER [--prompts FILE] [--model NAME]`
`python -m eval.picture_metrics preference FOLDER [--prompts FILE] --scorer pickscore|hpsv2|imagereward`

A folder is flat or in GenEval's layout, which names its prompts itself. `pip install 'orthus[metrics]'`.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval import picture_engines as engines
from eval.exits import exit_code
from eval.picture_folders import PictureFile, opened, read_folder
from eval.statistics import Task, bootstrap
from eval.whole_files import write_json

CLIP = "openai/clip-vit-large-patch14"
CLIP_FACTORS = {"100": 100.0, "2.5": 2.5}
SCORERS = ("pickscore", "hpsv2", "imagereward")


def fid(folder_a: str, folder_b: str, inception: engines.Inception, resizer: engines.Resizer, batch_size: int) -> dict[str, Any]:
    """FID and KID between two folders."""
    found = [engines.features(opened(read_folder(folder)), inception, resizer, batch_size) for folder in (folder_a, folder_b)]
    return engines.distances(found[0], found[1], inception, resizer)


def score(files: Sequence[PictureFile], scorer: engines.Scorer, is_clipped: bool, batch_size: int) -> dict[str, Any]:
    """Mean of factor x cosine over pictures, with an interval over prompts.

    is_clipped: negative cosines count as 0 (CLIPScore, arXiv 2104.08718).
    Raises ValueError for a picture without a prompt.
    """
    lacking = [file.path for file in files if file.prompt is None]
    if lacking:
        raise ValueError(f"{len(lacking)} pictures have no prompt, such as {lacking[0]}; give --prompts FILE")
    values: list[float] = []
    for chunk in engines.chunks(files, batch_size):
        cosines = scorer.cosines([file.open() for file in chunk], [str(file.prompt) for file in chunk])
        values += (scorer.factor * (cosines.clamp(min=0) if is_clipped else cosines)).tolist()
    prompts = {str(file.prompt) for file in files}
    return {
        "score": bootstrap(Task(values, [file.prompt for file in files])).as_dict(),
        "model": scorer.name,
        "formula": f"{scorer.factor:g} x {'max(cosine, 0)' if is_clipped else 'cosine'}",
        "num_pictures": len(files),
        "num_prompts": len(prompts),
        "num_prompts_cut": sum(map(scorer.is_cut, prompts)),
    }


def load_scorer(name: str, checkpoint: str, device: str) -> engines.Scorer:
    """A preference scorer by its name. NotImplementedError for ImageReward, which no library here can load."""
    if name == "pickscore":
        return engines.load_clip(checkpoint or engines.PICKSCORE, engines.PICKSCORE_PROCESSOR, device=device)
    if name == "hpsv2":
        return engines.load_hpsv2(checkpoint, device)
    raise NotImplementedError(
        "ImageReward is a BLIP of its own, and its package does not import beside transformers 5; score the folder with "
        "evalscope (pip install 'evalscope[aigc]', its metric ImageRewardScore) in an environment of its own"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for name in ("fid", "clip", "preference"):
        command = commands.add_parser(name)
        command.add_argument("folder")
        command.add_argument("--output", help="JSON file for the result")
        command.add_argument("--batch-size", type=int, default=32)
        command.add_argument("--device", default="cpu")
        if name == "fid":
            command.add_argument("folder_b")
            command.add_argument("--inception", default="", help="TorchScript file in place of torch-fidelity's network")
            command.add_argument("--resizer", choices=list(engines.RESIZERS), default="clean")
            continue
        command.add_argument("--prompts", help="lines in the order of the file names, or a JSON object from name to prompt")
        if name == "clip":
            command.add_argument("--model", default=CLIP, help="folder or hub name of a CLIP or SigLIP")
            command.add_argument("--factor", choices=list(CLIP_FACTORS), default="100")
        else:
            command.add_argument("--scorer", choices=SCORERS, required=True)
            command.add_argument("--checkpoint", default="", help="folder (pickscore) or file (hpsv2) in place of the hub's")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the numbers and write them."""
    arguments = parser().parse_args(argv)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}; give at least 1")
    if arguments.command == "fid":
        inception = engines.load_inception(arguments.inception, arguments.device)
        result = fid(arguments.folder, arguments.folder_b, inception, arguments.resizer, arguments.batch_size)
    else:
        files = read_folder(arguments.folder, arguments.prompts)
        is_clip = arguments.command == "clip"
        if is_clip:
            scorer = engines.load_clip(arguments.model, factor=CLIP_FACTORS[arguments.factor], device=arguments.device)
        else:
            scorer = load_scorer(arguments.scorer, arguments.checkpoint, arguments.device)
        result = score(files, scorer, is_clip, arguments.batch_size)
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.output:
        said = " ".join(sys.argv[1:] if argv is None else argv)
        versions = {name: version(name) for name in ("torch", "transformers", "pillow")} | {"python": platform.python_version()}
        write_json(Path(arguments.output), {**result, "command": f"python -m eval.picture_metrics {said}", "versions": versions})


if __name__ == "__main__":
    sys.exit(exit_code(main))
