"""The model that an evaluation asks."""

from __future__ import annotations

from dataclasses import dataclass
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


def load(folder: str, settings: ModelSettings) -> tuple[Any, Any]:
    """Model in eval mode, and processor."""
    from orthus.modeling import OrthusForConditionalGeneration
    from orthus.processing import OrthusProcessor

    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    quantized = quantization(settings.quantize)
    model = OrthusForConditionalGeneration.from_pretrained(folder, dtype=settings.dtype, quantization_config=quantized)
    return model.eval().to(torch.device(settings.device)), OrthusProcessor.from_pretrained(folder)
