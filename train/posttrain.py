"""Post-training of an earlier model: `python -m train.posttrain configs/small/posttrain.yaml [key=value ...]`.

`--dry-run [--processes N] [--memory GIB] [--tflops X]` prints what the run would take, and reads neither data nor weights.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.small_tasks import shows
from orthus.adapters import add_lora
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training import planning
from orthus.training.optim import freeze
from orthus.training.settings import OptimSettings, RunSettings, load_settings, to_dict
from orthus.training.stages import DataSettings, LoraSettings, SampleSettings, check_stage, load_model, replace_head, run_stage


@dataclass(frozen=True)
class PostStage:
    """`model`: folder of the model to start from. `lora`: train adapters on its backbone; `final` then holds the merged model.
    `head`: fields of a new diffusion head in place of the model's (`head.objective=v_prediction`)."""

    run: RunSettings
    data: DataSettings
    model: str
    optim: OptimSettings = OptimSettings()
    samples: SampleSettings = SampleSettings()
    frozen: tuple[str, ...] = ()
    attention: str = "sdpa"
    lora: LoraSettings | None = None
    head: dict[str, Any] | None = None


def main(argv: Sequence[str]) -> None:
    argv, hardware = planning.requested(argv)
    stage = load_settings(PostStage, argv[0], argv[1:])
    check_stage(stage.run, stage.data, stage.samples, stage.lora)
    if hardware is not None:
        planning.dry_run(planned_model(stage), stage.data, stage.run, stage.optim, stage.attention, hardware)
        return
    model = load_model(stage.model, stage.frozen, stage.lora, stage.run.seed)
    if stage.head is not None:
        replace_head(model, stage.head, stage.run.seed)
    processor = OrthusProcessor.from_pretrained(stage.model)
    model.set_attn_implementation(stage.attention)
    run_stage(model, processor, stage.data, stage.run, stage.optim, stage.samples, to_dict(stage), shows)


def planned_model(stage: PostStage) -> OrthusForConditionalGeneration:
    """The stage's model without storage, from the config of its folder. ValueError for integer weights, which it cannot have."""
    lora = stage.lora
    if lora is not None and lora.quantize != "no":
        raise ValueError(f"--dry-run does not know integer weights (lora.quantize={lora.quantize}); plan with lora.quantize=no")
    model = planning.meta_model(planning.config_in(stage.model), keeps_dtype=stage.lora is not None)
    freeze(model, stage.frozen)
    with torch.device("meta"):
        if lora is not None:
            model = add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets)
        if stage.head is not None:
            replace_head(model, stage.head, stage.run.seed)
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
