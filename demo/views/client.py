"""One endpoint for programs: `gradio_client.Client(url).predict(..., api_name="/generate")`."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from demo.app_desk import Desk, Draft, Drawn, options_of, seed_of, text_of, told
from demo.app_files import picture_input
from demo.defaults import TASKS, default_options
from orthus.data.schema import Segment, Turn

NAME = "client"


def build(desk: Desk) -> None:
    """Hidden components: they only give the endpoint its types."""
    text = gr.Textbox(label="text", visible=False)
    picture = picture_input(desk.folder, None, label="picture", visible=False)
    task = gr.Dropdown(list(TASKS), value="chat", label="task", visible=False)
    seed = gr.Number(0, label="seed", precision=0, visible=False)
    guidance = gr.Number(0, label="guidance", visible=False)
    image_guidance = gr.Number(0, label="image_guidance", visible=False)
    said = gr.JSON(label="segments", visible=False)
    pictures = gr.Gallery(label="pictures", format="png", visible=False)
    button = gr.Button(visible=False)
    inputs = [text, picture, task, seed, guidance, image_guidance]
    button.click(_generator(desk), inputs, [said, pictures], api_name="generate", api_description=DESCRIPTION)


DESCRIPTION = (
    "Answer `text` and an optional `picture`; task: chat, draw, edit or story; guidance 0: as the "
    "checkpoint likes it. Gives the answer in order, text as "
    '{"text": ...} and pictures as {"picture": index, "share": of its latents}, "finish_reason" at the end, and the pictures.'
)


def _generator(desk: Desk) -> Any:
    def generate(
        text: str | None, picture: str | None, task: str, seed: float | None, guidance: float | None,
        image_guidance: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[dict[str, Any], list[Image.Image]]]:  # fmt: skip
        segments: list[Segment] = [] if picture is None else [desk.read(picture)]
        text = text_of(text, desk.settings.max_text)
        segments += [text] if text else []
        if not segments or (task == "edit" and (len(segments) < 2)):
            raise told("Give text, a picture, or both; an edit needs both.")
        given = {"guidance": guidance, "image_guidance": image_guidance}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
        try:
            default = default_options(task, desk.processor)
        except (ValueError, TypeError) as error:
            raise told(str(error)) from error
        options = options_of(default, seed=seed_of(seed), **chosen)
        for progress in desk.run(request, NAME, [([Turn("user", tuple(segments))], options)], replaces=False):
            yield described(progress.drafts[0])

    return generate


def described(draft: Draft) -> tuple[dict[str, Any], list[Image.Image]]:
    """The answer so far as JSON, and its pictures."""
    pictures: list[Image.Image] = []
    segments: list[dict[str, Any]] = []
    for part in draft.parts:
        if isinstance(part, Drawn):
            segments.append({"picture": len(pictures), "share": part.share})
            pictures.append(part.picture)
        else:
            segments.append({"text": part})
    return {"segments": segments, "finish_reason": draft.answer.finish_reason if draft.answer else None}, pictures
