"""A few-step diffusion head for a trained model: `python -m train.distil configs/small/distil.yaml [key=value ...]`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from orthus.data.schema import Turn
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training.distillation import Distillation, DistillationSettings
from orthus.training.settings import OptimSettings, RunSettings, load_settings, to_dict
from orthus.training.stages import DataSettings, SampleSettings, check_stage, run_stage


@dataclass(frozen=True, kw_only=True)
class DistilStage(DistillationSettings):
    """`model`: folder of the model whose head is distilled."""

    run: RunSettings
    data: DataSettings
    model: str
    optim: OptimSettings = OptimSettings()
    samples: SampleSettings = SampleSettings()
    attention: str = "sdpa"


def main(argv: Sequence[str]) -> None:
    stage = load_settings(DistilStage, argv[0], argv[1:])
    check_stage(stage.run, stage.data, stage.samples, can_grade=False)
    model = OrthusForConditionalGeneration.from_pretrained(stage.model, dtype=torch.float32)
    model.set_attn_implementation(stage.attention)
    processor = OrthusProcessor.from_pretrained(stage.model)
    unconditional = processor.render([Turn("user", (processor.unconditional_prompt,))], add_generation_prompt=True)
    distillation = Distillation(model, stage, unconditional.input_ids)
    samples = replace(stage.samples, num_diffusion_steps=stage.num_diffusion_steps)
    if stage.guidance is not None:  # the student draws as if it were guided, so the saved processor asks for no more
        samples = replace(samples, guidance=1.0)
        processor.guidance = processor.interleaved_guidance = 1.0
    run_stage(cast(Any, distillation), processor, stage.data, stage.run, stage.optim, samples, to_dict(stage))


if __name__ == "__main__":
    main(sys.argv[1:])
