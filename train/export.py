"""Write a trained model for shipping: weights rounded to bf16 on disk, fp32 in memory.

`python -m train.export runs/small/posttrain/final checkpoints/orthus-small`
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder that a training stage left in final/")
    parser.add_argument("output")
    args = parser.parse_args(argv)
    output = Path(args.output)
    model = OrthusForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(output)
    OrthusProcessor.from_pretrained(args.model).save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["dtype"] = "float32"  # what `from_pretrained` computes in; the file stays half the size
    temporary = output / ".config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, output / "config.json")
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"{output}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
