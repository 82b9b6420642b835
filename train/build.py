"""An Orthus-base from a language model and an autoencoder, ready for stage 1:

    python -m train.build --backbone HuggingFaceTB/SmolLM2-135M --autoencoder stabilityai/sd-vae-ft-mse --image-size 256 \\
        --images ~/pictures --output runs/smol-base
    python -m train.build --backbone leloy/Anole-7b-v0.1-hf --output runs/anole-base      # Chameleon or Anole, as in the paper
    python -m train.posttrain configs/base/from_language_model.yaml model=runs/smol-base
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from orthus.autoencoder_loading import load_autoencoder
from orthus.backbones import load_config
from orthus.base_model import Base, BaseOptions, Pictures, base_from_chameleon, base_from_language_model
from orthus.configuration import OBJECTIVES
from orthus.conversion import is_published
from orthus.data.pictures import FolderPictures, PictureLoader
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor
from orthus.processing import OrthusProcessor

WORLD = "world"
BATCH_SIZE = 8
DTYPES = ("float32", "bfloat16", "float16", "auto")
RECORD = "build.json"

logger = logging.getLogger("orthus.build")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.build", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backbone", required=True, help="folder or hub name of a causal language model, or of a Chameleon")
    add("--autoencoder", help="folder or hub name: ours, Chameleon's VQGAN, diffusers, timm; a Chameleon's own by default")
    add("--output", required=True, type=Path, help="new folder for model and processor")
    add("--images", help=f"folder of pictures in which latents are measured, or '{WORLD}' for the procedural small world")
    add("--num-codes", type=int, help="rows of the codebook; default the autoencoder's own codebook, else 8192")
    add("--image-size", type=int, help="side of the pictures in pixels, where the autoencoder leaves a choice")
    add("--autoencoder-options", nargs="+", default=[], metavar="KEY=VALUE", help="of load_autoencoder, such as subfolder=vae")
    add("--objective", choices=OBJECTIVES, help="of the head; default flow_matching, for a Chameleon v_prediction as published")
    add("--head-width", type=int, default=1536)
    add("--head-blocks", type=int, default=3)
    add("--temperature", type=float, help="tau of soft VQ; default 1 with the codebook of a quantiser, else measured")
    add("--image-loss-weight", type=float, default=100.0)
    add("--dtype", choices=DTYPES, default="float32", help="of the weights, float32 to train; auto keeps the backbone's")
    add("--gguf-file", help="name of a GGUF file in --backbone; its weights are unpacked")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    with told(), new_folder(args.output, args.overwrite) as folder:
        torch.manual_seed(args.seed)
        model, processor = build(args)
        model.save_pretrained(str(folder))
        processor.save_pretrained(folder)
        check_saved(processor, folder)
        record = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        describe(model)
    logger.info("next: python -m train.posttrain configs/base/from_language_model.yaml model=%s", args.output)


def build(args: argparse.Namespace) -> Base:
    """Model and processor that the arguments ask for."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    sizes = (args.num_codes, args.objective, args.head_width, args.head_blocks, args.temperature, args.image_loss_weight)
    options = BaseOptions(*sizes, dtype)
    is_chameleon = is_published(load_config(args.backbone, args.gguf_file).to_dict())
    given = dict(parse_option(option) for option in args.autoencoder_options)
    if "image_size" in given:
        raise ValueError("--autoencoder-options has image_size; use --image-size")
    if args.num_codes is not None and args.num_codes < 2:
        raise ValueError(f"--num-codes {args.num_codes} is too few; give at least 2, typically 8192")
    autoencoder = None
    if (args.autoencoder or given) and not (is_chameleon and args.autoencoder == args.backbone):
        autoencoder = load_autoencoder(args.autoencoder or "", args.image_size, **given)
    elif args.image_size is not None:
        raise ValueError(f"--image-size {args.image_size} is for another autoencoder than the checkpoint's; give --autoencoder")
    if is_chameleon:
        return base_from_chameleon(args.backbone, autoencoder, pictures(args), options)
    if autoencoder is None:
        raise ValueError(f"{args.backbone} is a language model without pictures; give --autoencoder")
    return base_from_language_model(args.backbone, autoencoder, pictures(args), options, args.gguf_file)


def parse_option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--autoencoder-options {text!r} has no value; write key=value, such as subfolder=vae")
    return key, yaml.safe_load(value)


def pictures(args: argparse.Namespace) -> Pictures | None:
    """Batches of pictures out of `--images`."""
    if args.images is None:
        return None

    def batches(processor: OrthusImageProcessor, number: int) -> Iterable[Mapping[str, Tensor]]:
        if args.images == WORLD:
            world = WorldConfig(image_size=64 if processor.size["shortest_edge"] <= 64 else 128)
            yield from islice(PictureLoader(world, processor, BATCH_SIZE, num_objects=5), -(-number // BATCH_SIZE))
            return
        found = FolderPictures(args.images, processor, number, BATCH_SIZE, args.seed)
        yield from found
        logger.info("images: %d read from %s, %d unreadable", found.num_read, args.images, found.num_unreadable)

    return batches


# ---------------------------------------------------------------------- output


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` at the end, and disappears if anything goes wrong before.

    Raises ValueError for an `output` that exists and is not an empty folder, unless it may be replaced.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())) and not overwrite:
        raise ValueError(f"{output} exists; give another --output, or --overwrite to replace it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if output.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
            output.rename(replaced / output.name)
            folder.rename(output)
            shutil.rmtree(replaced)
        else:
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_saved(processor: OrthusProcessor, folder: Path) -> None:
    """ValueError if the saved tokenizer gives the special tokens or a text other ids than the one in memory."""
    loaded = OrthusProcessor.from_pretrained(folder)
    names = ("bos", "pad", "boi", "eoi", "image", "separator")
    before, after = ([getattr(p, f"{name}_token_id") for name in names] for p in (processor, loaded))
    text = "Draw 2 red  circles; é?\n"
    if before != after or processor.encode_text(text) != loaded.encode_text(text):
        kind = type(processor.tokenizer).__name__
        raise ValueError(f"the tokenizer ({kind}) changes when it is saved and loaded: ids {before} become {after}; "
                         "give a backbone with a tokenizer.json")  # fmt: skip


def describe(model: Any) -> None:
    """Parameters by part, and the ids."""
    for name, part in model.named_children():
        logger.info("%-18s %12s parameters", name, f"{sum(p.numel() for p in part.parameters()):,}")
    logger.info("%-18s %12s parameters", "all", f"{model.num_parameters():,}")
    config = model.config
    if config.tie_word_embeddings:
        logger.info("lm_head is tied to the token embeddings")
    rows = f"{config.code_offset}..{config.code_offset + config.num_codes - 1}"
    names = ("bos", "pad", "eos", "boi", "eoi", "image", "separator")
    logger.info("ids: code rows %s%s", rows, "".join(f", {name} {getattr(config, f'{name}_token_id')}" for name in names))
    attention = model.backbone.config._attn_implementation
    if attention != "sdpa":
        logger.info("this backbone needs `attention: %s` in the settings of a stage", attention)


@contextmanager
def told() -> Iterator[None]:
    """While it lasts, what the library reports about the build is printed."""
    root, handler = logging.getLogger("orthus"), logging.StreamHandler(sys.stdout)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


if __name__ == "__main__":
    main(sys.argv[1:])
