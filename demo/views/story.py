"""Story: one request, a document of text and pictures, and the document as files."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo.app_desk import Desk, options_of, seed_of, text_of
from demo.app_examples import STORY_EXAMPLES
from demo.app_pages import about, archive, download, parts_html, status
from demo.app_settings import Setting, example_buttons
from demo.defaults import default_options
from orthus.data.schema import Turn

NAME = "story"
EMPTY = '<p class="welcome">The story appears here.</p>'


def build(desk: Desk) -> list[Setting]:
    default = default_options("story", desk.processor)
    with gr.Row():
        with gr.Column(min_width=300, scale=2):
            prompt = gr.Textbox(STORY_EXAMPLES[0], label="What to tell", lines=2, max_length=2000)
            with gr.Row(elem_classes="actions"):
                go = gr.Button("Tell", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            example_buttons("Examples", [(text,) for text in STORY_EXAMPLES], [prompt])
            with gr.Accordion("Guidance and length", open=False):
                guidance = gr.Slider(0, 10, default.guidance, step=0.1, label="Guidance")
                most = gr.Slider(1, 8, 4, step=1, label="Pictures at most")
                seed = gr.Number(0, label="Seed", precision=0, step=1, minimum=0, maximum=2**31 - 1)
        with gr.Column(min_width=300, scale=3, elem_classes="result"):
            note = gr.HTML(status(""))
            keep = gr.HTML("", elem_classes="keep")
            story = gr.HTML(EMPTY, elem_id="story")

    def tell(
        text: str | None, guidance: float, most: float, seed: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        text = text_of(text, desk.settings.max_text)
        if not text:
            yield status("Write what to tell."), gr.skip(), gr.skip()
            return
        turn = Turn("user", (text,))
        options = options_of(default, guidance=guidance, max_images=int(most), seed=seed_of(seed))
        for progress in desk.run(request, NAME, [([turn], options)]):
            (draft,) = progress.drafts
            yield status(progress.note), f'<article class="story">{parts_html(draft.parts, about(text))}</article>', ""
        segments = draft.segments
        turns = [turn, Turn("assistant", segments)] if segments else []
        link = download("orthus-story.zip", archive(text, turns), "Download the story (HTML, Markdown, PNG)") if turns else ""
        yield gr.skip(), gr.skip(), link

    inputs, outputs = [prompt, guidance, most, seed], [note, story, keep]
    gr.on([go.click, prompt.submit], tell, inputs, outputs, show_progress="hidden", api_visibility="private")
    stop.click(desk.stopper(NAME), None, None, show_progress="hidden", api_visibility="private")
    named = {"prompt": prompt, "guidance": guidance, "most": most, "seed": seed}
    return [Setting(f"story_{name}", part) for name, part in named.items()]
