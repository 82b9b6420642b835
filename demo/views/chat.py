"""Chat: several turns of text and pictures."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from demo.app_desk import Desk, options_of, seed_of, text_of
from demo.app_examples import CHAT_EXAMPLES, PICTURE
from demo.app_files import FILE_TYPES
from demo.app_pages import archive, download, draft_html, status, turns_html
from demo.app_settings import Setting
from demo.defaults import default_options
from orthus.data.schema import Segment, Turn

NAME = "chat"
WELCOME = '<p class="welcome">Ask about a picture, ask for one, or try an example below.</p>'


def build(desk: Desk) -> list[Setting]:
    turns = gr.State([], time_to_live=3600)
    with gr.Column(elem_id="chat-log"):
        history = gr.HTML(WELCOME, elem_id="chat-history")
        live = gr.HTML("", elem_id="chat-live")
    note = gr.HTML(status(""))
    box = gr.MultimodalTextbox(
        label="Message", show_label=False, placeholder="Write a message; add pictures with the clip", file_count="multiple",
        file_types=list(FILE_TYPES), elem_id="chat-box", max_plain_text_length=10_000,
    )  # fmt: skip
    with gr.Row(elem_classes="actions"):
        stop = gr.Button("Stop", size="sm", min_width=80)
        clear = gr.Button("New chat", size="sm", min_width=80)
        keep = gr.HTML("", elem_classes="keep")
    gr.Markdown("**Examples**", elem_classes="examples-label")
    with gr.Row(elem_classes="examples"):
        for text, has_picture in CHAT_EXAMPLES:
            example = {"text": text, "files": [str(PICTURE)] if has_picture else []}
            button = gr.Button(f"{text} (with a picture)" if has_picture else text, size="sm", min_width=0)
            button.click(lambda example=example: example, None, box, api_visibility="private", show_progress="hidden")
    with gr.Accordion("How it answers", open=False):
        default = default_options("chat", desk.processor)
        guidance = gr.Slider(0, 10, default.guidance, step=0.1, label="Guidance of pictures")
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature of text (0: the likeliest words)")
        seed = gr.Number(0, label="Seed", precision=0, step=1, minimum=0, maximum=2**31 - 1)
    inputs, outputs = [box, turns, guidance, temperature, seed], [box, turns, history, live, note, keep]
    answer = _answerer(desk)
    box.submit(answer, inputs, outputs, show_progress="hidden", api_visibility="private")
    stop.click(desk.stopper(NAME), None, None, show_progress="hidden", api_visibility="private")
    clear.click(_clearer(desk), None, [turns, history, live, note, keep], show_progress="hidden", api_visibility="private")
    return [Setting("chat_guidance", guidance), Setting("chat_temperature", temperature), Setting("chat_seed", seed)]


def _answerer(desk: Desk) -> Any:
    default = default_options("chat", desk.processor)

    def answer(
        message: dict[str, Any] | None,
        turns: list[Turn],
        guidance: float,
        temperature: float,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        message = message or {"text": "", "files": []}
        text = text_of(message["text"], desk.settings.max_text)
        pictures: list[Segment] = [desk.read(path) for path in message["files"]]
        segments = [*pictures, text] if text else pictures
        if not segments:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), status("Write something or add a picture."), gr.skip()
            return
        asked = [*(turns or []), Turn("user", tuple(segments))]
        chosen: dict[str, Any] = {"guidance": guidance, "seed": seed_of(seed)}
        if temperature > 0:
            chosen |= {"do_sample": True, "temperature": temperature}
        options = options_of(default, **chosen)
        yield None, gr.skip(), turns_html(asked), "", status("Working"), gr.skip()
        for progress in desk.run(request, NAME, [(asked, options)]):
            (draft,) = progress.drafts
            yield gr.skip(), gr.skip(), gr.skip(), draft_html(draft, text), status(progress.note), gr.skip()
        # A turn without an answer cannot be continued; it stays on the page and leaves the conversation.
        known = [*asked, Turn("assistant", draft.segments)] if draft.segments else turns
        page = turns_html(asked) + draft_html(draft, text)
        link = download("orthus-chat.zip", archive("Orthus chat", known), "Download the chat") if known else ""
        yield gr.skip(), known, page, "", gr.skip(), link

    return answer


def _clearer(desk: Desk) -> Any:
    def clear(request: gr.Request) -> tuple[Any, ...]:
        desk.stop(request, NAME)
        return [], WELCOME, "", status(""), ""

    return clear
