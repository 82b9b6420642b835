"""Edit: a picture and an instruction; before and after under one slider."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from demo.app_desk import Desk, Draft, Drawn, options_of, seed_of, text_of
from demo.app_examples import EDIT_EXAMPLES, PICTURE
from demo.app_files import picture_input
from demo.app_pages import about, blank, download, img, png, status
from demo.app_settings import Setting, example_buttons
from demo.defaults import default_options
from orthus.data.schema import Turn

NAME = "edit"
SHOWN_PIXELS = 320


def build(desk: Desk) -> list[Setting]:
    default = default_options("edit", desk.processor)
    with gr.Row():
        with gr.Column():
            picture = picture_input(
                desk.folder, str(PICTURE), label="Picture", height=240, elem_id="edit-picture", alt_text="the picture to edit"
            )
            text = gr.Textbox(EDIT_EXAMPLES[0], label="Instruction", max_length=2000)
            example_buttons("Examples", [(example,) for example in EDIT_EXAMPLES], [text])
            with gr.Row(elem_classes="actions"):
                go = gr.Button("Edit", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            with gr.Accordion("Guidance and seed", open=False):
                guidance = gr.Slider(0, 10, default.guidance, step=0.1, label="Text guidance")
                image_guidance = gr.Slider(0, 10, default.image_guidance or 1.0, step=0.1, label="Image guidance")
                seed = gr.Number(0, label="Seed", precision=0, step=1, minimum=0, maximum=2**31 - 1)
        with gr.Column(elem_classes="result"):
            note = gr.HTML(status(""))
            result = gr.HTML(compare(None, None, ""), elem_id="edit-result")
            keep = gr.HTML("", elem_classes="keep")
    inputs, outputs = [picture, text, guidance, image_guidance, seed], [note, result, keep]
    gr.on([go.click, text.submit], _editor(desk), inputs, outputs, show_progress="hidden", api_visibility="private")
    stop.click(desk.stopper(NAME), None, None, show_progress="hidden", api_visibility="private")
    named = {"instruction": text, "guidance": guidance, "image_guidance": image_guidance, "seed": seed}
    return [Setting(f"edit_{name}", part) for name, part in named.items()]


def _editor(desk: Desk) -> Any:
    default = default_options("edit", desk.processor)

    def edit(
        path: str | None, text: str | None, guidance: float, image_guidance: float, seed: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        text = text_of(text, desk.settings.max_text)
        if path is None or not text:
            yield status("Give a picture and say what to change."), gr.skip(), gr.skip()
            return
        before = desk.read(path)
        options = options_of(default, guidance=guidance, image_guidance=image_guidance, seed=seed_of(seed))
        for progress in desk.run(request, NAME, [([Turn("user", (before, text))], options)]):
            (draft,) = progress.drafts
            yield status(progress.note), compare(before, latest(draft), text, said(draft)), ""
        link = download("orthus-edit.png", png(draft.pictures[0]), "Download the picture", "image/png") if draft.pictures else ""
        yield gr.skip(), gr.skip(), link

    return edit


def latest(draft: Draft) -> Image.Image | None:
    return next((part.picture for part in reversed(draft.parts) if isinstance(part, Drawn)), None)


def said(draft: Draft) -> str:
    return " ".join(part.strip() for part in draft.parts if isinstance(part, str))


def compare(before: Image.Image | None, after: Image.Image | None, asked: str, text: str = "") -> str:
    """Two pictures in one frame, of which a slider shows more or less; of the same size whatever there is of them."""
    first = blank(SHOWN_PIXELS) if before is None else img(before, "before", SHOWN_PIXELS)
    second = "" if after is None else f'<div class="after">{img(after, about(asked), SHOWN_PIXELS)}</div>'
    caption = status(text)
    return (
        f'<div class="compare" style="--cut:0%">{first}{second}<span class="edge"></span>'
        '<label><span>After</span><input type="range" min="0" max="100" value="0" '
        f'aria-label="Share of the picture before the edit"><span>Before</span></label></div>{caption}'
    )
