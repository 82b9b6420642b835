"""Draw: one prompt, several pictures, and what the small world's grader sees in them."""

import html
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from demo.app_desk import Desk, Draft, Drawn, options_of, seed_of, text_of
from demo.app_examples import DRAW_EXAMPLES
from demo.app_pages import about, archive, blank, download, img, status
from demo.app_settings import Setting, example_buttons
from demo.defaults import default_options, picture_size, says_first
from eval.grader import detect
from orthus import diffusion
from orthus.data.schema import Turn
from orthus.data.world.scene import IMAGE_SIZES
from orthus.sampling import Sampling
from orthus.serving import Options

NAME = "draw"
MAX_PICTURES = 8
BY_DEFAULT = "default"


def build(desk: Desk) -> list[Setting]:
    default = default_options("draw", desk.processor)
    head = desk.engine.model.diffusion_head
    solvers = [name for name in diffusion.SOLVERS if name != "euler" or head.config.objective == "flow_matching"]
    can_grade = says_first(desk.processor) and picture_size(desk.processor)[0] in IMAGE_SIZES
    with gr.Row():
        with gr.Column(min_width=300, scale=2):
            prompt = gr.Textbox(DRAW_EXAMPLES[0], label="Prompt", lines=2, max_length=2000)
            with gr.Row(elem_classes="actions"):
                go = gr.Button("Draw", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            example_buttons("Examples", [(text,) for text in DRAW_EXAMPLES], [prompt])
            num = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures")
            seed = gr.Number(0, label="Seed of the first", precision=0, step=1, minimum=0, maximum=2**31 - 1 - MAX_PICTURES)
            with gr.Accordion("How it is drawn", open=False):
                guidance = gr.Slider(0, 10, default.guidance, step=0.1, label="Guidance")
                steps = gr.Slider(1, 100, head.resolve(Sampling()).num_diffusion_steps, step=1, label="Diffusion steps")
                solver = gr.Dropdown([BY_DEFAULT, *solvers], value=BY_DEFAULT, label="Solver", filterable=False)
                negative = gr.Textbox("", label="Negative prompt (what guidance pushes away from)", max_length=2000)
                first = gr.Checkbox(
                    says_first(desk.processor), label="Say first what to draw", visible=says_first(desk.processor)
                )
        with gr.Column(min_width=300, scale=3, elem_classes="result"):
            note = gr.HTML(status(""))
            with gr.Row(elem_id="draw-grid", elem_classes="grid"):
                slots = [gr.HTML("", elem_classes="slot") for _ in range(MAX_PICTURES)]
            graded = gr.Checkbox(False, label="Show what the grader sees", visible=can_grade, container=False, elem_id="graded")
            keep = gr.HTML("", elem_classes="keep")
    inputs, outputs = [prompt, num, seed, guidance, steps, solver, negative, first], [note, keep, *slots]
    draw = _drawer(desk, default, can_grade)
    gr.on([go.click, prompt.submit], draw, inputs, outputs, show_progress="hidden", api_visibility="private")
    stop.click(desk.stopper(NAME), None, None, show_progress="hidden", api_visibility="private")
    named = {"prompt": prompt, "num": num, "seed": seed, "guidance": guidance, "steps": steps, "solver": solver,
             "negative": negative, "first": first, "graded": graded}  # fmt: skip
    return [Setting(f"draw_{name}", part) for name, part in named.items()]


def _drawer(desk: Desk, default: Options, can_grade: bool) -> Any:
    def draw(
        prompt: str | None, num: float, seed: float | None, guidance: float, steps: float, solver: str, negative: str | None,
        first: bool, request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        unused = [gr.skip()] * MAX_PICTURES
        prompt, first_seed = text_of(prompt, desk.settings.max_text), seed_of(seed)
        if not prompt:
            yield [status("Write what to draw."), gr.skip(), *unused]
            return
        changes: dict[str, Any] = {} if first else {"modality": "image", "text_guidance": 1.0, "force_image": False}
        options = options_of(
            default,
            guidance=guidance,
            num_diffusion_steps=int(steps),
            solver=None if solver == BY_DEFAULT else solver,
            negative_prompt=text_of(negative, desk.settings.max_text) or None,
            **changes,
        )
        turns = [Turn("user", (prompt,))]
        requests = [(turns, replace(options, seed=first_seed + place)) for place in range(int(num))]
        cards: list[Any] = [""] * MAX_PICTURES
        for progress in desk.run(request, NAME, requests):
            fresh = [place in progress.changed for place in range(len(requests))]
            cards[: len(fresh)] = [
                card(draft, prompt, first_seed + place, can_grade) if is_new else gr.skip()
                for place, (draft, is_new) in enumerate(zip(progress.drafts, fresh, strict=True))
            ]
            yield [status(progress.note), "", *cards]
            cards = [gr.skip()] * MAX_PICTURES
        answers = [turn for draft in progress.drafts if draft.segments for turn in (*turns, Turn("assistant", draft.segments))]
        link = download("orthus-pictures.zip", archive(prompt, answers), "Download the pictures") if answers else ""
        yield [gr.skip(), link, *unused]

    return draw


def card(draft: Draft, prompt: str, seed: int, can_grade: bool) -> str:
    """One picture of the grid, of the same size before, while and after it is drawn."""
    picture = next((part for part in reversed(draft.parts) if isinstance(part, Drawn)), None)
    said = " ".join(part.strip() for part in draft.parts if isinstance(part, str))
    shown = blank() if picture is None else img(picture.picture, about(prompt))
    seen = grader_html(picture.picture) if picture is not None and draft.answer is not None and can_grade else ""
    text = html.escape(said or ("stopped" if draft.is_stopped else ""))
    return f'<figure class="card"><div class="frame">{shown}{seen}</div><figcaption>seed {seed}<br>{text}</figcaption></figure>'


def grader_html(picture: Image.Image) -> str:
    """Boxes and names of what the grader of the small world finds, over the picture."""
    found = detect(np.asarray(picture.convert("RGB")))
    boxes = []
    for one in found:
        x0, y0, x1, y1 = one.box
        boxes.append(f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>')
        name = html.escape(f"{one.color} {one.shape}")
        boxes.append(f'<text x="{min(x0, picture.width - 22):.1f}" y="{y0 - 1 if y0 > 6 else y1 + 4.5:.1f}">{name}</text>')
    names = ", ".join(f"{one.color} {one.shape} ({one.score:.2f})" for one in found) or "nothing"
    view = f"0 0 {picture.width} {picture.height}"
    return (
        f'<svg class="seen" viewBox="{view}" role="img" aria-label="the grader sees {html.escape(names, quote=True)}">'
        f'{"".join(boxes)}</svg><span class="seen-names">{html.escape(names)}</span>'
    )
