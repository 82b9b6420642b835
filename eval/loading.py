"""The model that an evaluation asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from orthus.adapters import quantization


@dataclass(frozen=True)
class ModelSettings:
    """Where a model runs and in what numbers; `quantize`: the backbone's weights as int8 or int4.

    device: cpu, or cuda: one process per GPU under torchrun. num_threads: of each process on the CPU; null: as torch decides.
    """

    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["no", "int8", "int4"] = "no"
    num_threads: int | None = None


def require_model(name: str) -> None:
    """Raises ValueError at once for a folder that is not there, which the hub would be asked for again and again.

    A name means a folder if it is absolute, starts with a dot, or starts with something that is here; others are the hub's.
    """
    path = Path(name)
    is_local = path.is_absolute() or name.startswith(".") or Path(*path.parts[:1]).exists()
    if is_local and not path.is_dir():
        raise ValueError(f"model {name!r} is no folder; give the folder of a model, or the name of one on the hub")


def load(folder: str, settings: ModelSettings) -> tuple[Any, Any]:
    """Model in eval mode, and processor. Raises ValueError for a folder that is not there."""
    from orthus.modeling import OrthusForConditionalGeneration
    from orthus.processing import OrthusProcessor

    require_model(folder)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    quantized = quantization(settings.quantize)
    model = OrthusForConditionalGeneration.from_pretrained(folder, dtype=settings.dtype, quantization_config=quantized)
    return model.eval().to(torch.device(settings.device)), OrthusProcessor.from_pretrained(folder)
