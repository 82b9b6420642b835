"""Post-training of an earlier model: `python -m train.posttrain configs/small/posttrain.yaml [key=value ...]`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthus.processing import OrthusProcessor
from orthus.training.settings import OptimSettings, RunSettings, load_settings, to_dict
from orthus.training.stages import DataSettings, LoraSettings, SampleSettings, load_model, replace_head, run_stage


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
    stage = load_settings(PostStage, argv[0], argv[1:])
    model = load_model(stage.model, stage.frozen, stage.lora, stage.run.seed)
    if stage.head is not None:
        replace_head(model, stage.head, stage.run.seed)
    processor = OrthusProcessor.from_pretrained(stage.model)
    model.set_attn_implementation(stage.attention)
    run_stage(model, processor, stage.data, stage.run, stage.optim, stage.samples, to_dict(stage))


if __name__ == "__main__":
    main(sys.argv[1:])
