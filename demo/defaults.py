"""How a checkpoint is asked by default, one place for the API, the app and the terminal.

`generation_config.json` has no place for these: `transformers` drops names that it does not know.
"""

from typing import Any

from orthus.processing import OrthusProcessor
from orthus.serving import Options
from orthus.tokenization import SEPARATOR_TOKEN

TASKS = ("chat", "draw", "edit", "story")
MAX_ANSWER_TOKENS = 96  # of an answer in text alone
GUIDANCE_INTERVAL = (0.0, 0.85)  # whether a cell holds anything is decided above it, and guidance would spoil that
TEXT_GUIDANCE = 3.0  # weight of the prompt in what is said before a picture
PLANNED: dict[str, Any] = {"modality": "interleaved", "max_images": 1, "force_image": True}  # says first what it draws


def says_first(processor: OrthusProcessor) -> bool:
    """Whether the checkpoint says what it will draw before it draws: those of our recipes, which have our own tokenizer."""
    return processor.separator_token == SEPARATOR_TOKEN


def default_options(task: str, processor: OrthusProcessor) -> Options:
    """What draws well for one of `TASKS`; seed 0, likeliest words. Raises ValueError for another task.

    Checkpoints of our recipes were measured with the constants above; the others draw at once, with the processor's guidance.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if not says_first(processor):
        if task in ("chat", "story"):
            return Options(guidance=processor.interleaved_guidance, force_image=task == "story")
        return Options(modality="image", guidance=processor.guidance, max_images=1)
    options: dict[str, Any] = {"guidance": processor.guidance, "guidance_interval": GUIDANCE_INTERVAL}
    if task == "draw":
        options |= {"text_guidance": TEXT_GUIDANCE, **PLANNED}
    elif task == "edit":
        options |= {"image_guidance": 1.0, **PLANNED}
    elif task == "story":
        options |= {"force_image": True}
    return Options(**options)


def picture_size(processor: OrthusProcessor) -> tuple[int, int]:
    """Width and height of what the model draws, in pixels."""
    crop = processor.image_processor.crop_size
    return crop["width"], crop["height"]
