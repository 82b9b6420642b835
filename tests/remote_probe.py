"""What test_remote_code.py runs where `orthus` is installed and, as a script, in a process that cannot import it.

`python remote_probe.py FOLDER AGAIN OUTPUT` loads FOLDER with `trust_remote_code=True`, saves it into AGAIN and what `results`
returns into OUTPUT.
"""

import importlib
import sys
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor


class Blocker:
    """First finder of the process: there is no `orthus`, whatever is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "orthus":
            raise ImportError(f"{name} is blocked")


def results(model: Any, processor: Any) -> dict[str, Tensor]:
    """An answer about a picture, a drawing with guidance, and a training forward; on one thread, so that sums have one order."""
    picture = Image.new("RGB", (80, 64), "white")
    ImageDraw.Draw(picture).ellipse((4, 4, 20, 20), fill="red")
    asked = processor(segments=[picture, "is there a red circle?"])
    drawn = processor(images=None, text="a photo of a blue star")
    chat = [
        {"role": "user", "content": "a photo of a red circle"},
        {"role": "assistant", "content": [{"type": "text", "text": "circle red"}, {"type": "image", "image": picture}]},
    ]
    learned = processor.apply_chat_template(chat, add_generation_prompt=False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        answer = model.generate(**asked, modality="text", max_new_tokens=24)
        guided = processor.guidance_streams([], 2.0)
        drawing = model.generate(**drawn, modality="image", generator=torch.Generator().manual_seed(0), **guided)
        torch.manual_seed(0)
        loss = model(**learned, labels=learned["input_ids"]).loss
    finally:
        torch.set_num_threads(num_threads)
    return {
        "pixel_values": asked["pixel_values"],
        "answer": answer.sequences,
        "latents": drawing.image_latents[0],
        "pixels": drawing.pixel_values[0],
        "loss": loss.detach(),
    }


def refusals(folder: str) -> list[str]:
    """What the auto classes say without `trust_remote_code=True`: when it is left out, and when it is False."""
    messages = []
    attempts: list[tuple[Any, dict[str, Any]]] = [(AutoConfig, {})]
    classes = (AutoConfig, AutoProcessor, AutoImageProcessor, AutoModelForImageTextToText)
    for auto_class, options in attempts + [(auto_class, {"trust_remote_code": False}) for auto_class in classes]:
        try:
            messages.append(f"loaded {auto_class.from_pretrained(folder, **options)}")
        except ValueError as error:
            messages.append(str(error))
    return messages


def main(folder: str, again: str, output: str) -> None:
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    try:
        importlib.import_module("orthus")
    except ImportError:
        pass
    else:
        raise AssertionError("orthus can be imported")
    for message in refusals(folder):
        assert "trust_remote_code=True" in message, message
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert type(model.config) is type(config) and type(processor.image_processor) is type(image_processor), "two sets of modules"
    for name in ("AutoModelForMultimodalLM", "AutoModel"):
        assert type(getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)) is type(model), name
    model.save_pretrained(again)
    processor.save_pretrained(again)
    assert not [name for name in sys.modules if name.partition(".")[0] == "orthus"], "orthus was imported"
    torch.save(results(model, processor), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
