"""Inside: what the model computes while it draws, with the numbers of `demo.inside`."""

import contextlib
import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from demo.app_desk import Desk, options_of, seed_of, text_of, told
from demo.app_examples import INSIDE_EXAMPLES
from demo.app_files import picture_input
from demo.app_pages import img, status
from demo.app_settings import Setting, example_buttons
from demo.defaults import default_options
from demo.inside import Attended, Look, Microscope, Words, attended, entropy_bits
from orthus.data.schema import Segment, Turn
from orthus.serving import Options

NAME = "inside"
ALL_LAYERS = -1
MAX_AT_ONCE = 2  # computations beside the engine
WAIT_SECONDS = 20.0  # for one of them
PICTURE_PIXELS, PATCH_PIXELS, MAX_STATES = 224, 42, 12


@dataclass(frozen=True)
class Specimen:
    """What is looked at: a picture with everything that one pass over its conversation gave."""

    look: Look
    picture: Image.Image
    options: Options
    noise: Tensor  # (L, C)


def build(desk: Desk) -> list[Setting]:
    microscope = Microscope(desk.engine.model, desk.processor)
    num_layers = desk.engine.model.config.text_config.num_hidden_layers
    specimen = gr.State(None, time_to_live=3600)
    gr.Markdown("Draw a picture, or give one, and see how the model came to it, latent by latent.")
    with gr.Row():
        with gr.Column(min_width=260):
            prompt = gr.Textbox(INSIDE_EXAMPLES[0], label="Prompt", max_length=2000)
            example_buttons("Examples", [(text,) for text in INSIDE_EXAMPLES], [prompt])
            picture = picture_input(
                desk.folder, None, label="Picture to look into (optional)", height=180, alt_text="the picture to look into"
            )
            seed = gr.Number(0, label="Seed", precision=0, step=1, minimum=0, maximum=2**31 - 1)
            with gr.Row(elem_classes="actions"):
                go = gr.Button("Look inside", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            place = gr.Slider(0, desk.num_latents - 1, 0, step=1, label="Latent (left to right, top to bottom)")
            layer = gr.Slider(ALL_LAYERS, num_layers - 1, ALL_LAYERS, step=1, label="Layer of attention (-1: mean of all)")
        with gr.Column(min_width=300, scale=2, elem_classes="result"):
            note = gr.HTML(status(""))
            views = [gr.HTML("", elem_classes="panel") for _ in range(3)]
    free = threading.Semaphore(MAX_AT_ONCE)
    show = _shower(microscope, free)
    look = _looker(desk, microscope, show, free)
    inputs = [prompt, picture, seed, place, layer]
    gr.on([go.click, prompt.submit], look, inputs, [note, specimen, *views], show_progress="hidden", api_visibility="private")
    gr.on(
        [place.change, layer.change],
        show,
        [specimen, place, layer],
        views,
        show_progress="hidden",
        api_visibility="private",
        trigger_mode="always_last",
    )
    stop.click(desk.stopper(NAME), None, None, show_progress="hidden", api_visibility="private")
    named = {"prompt": prompt, "seed": seed, "latent": place, "layer": layer}
    return [Setting(f"inside_{name}", part) for name, part in named.items()]


def _looker(desk: Desk, microscope: Microscope, show: Any, free: threading.Semaphore) -> Any:
    default = default_options("draw", desk.processor)

    def look(
        prompt: str | None, path: str | None, seed: float | None, place: float, layer: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        prompt = text_of(prompt, desk.settings.max_text)
        if not prompt:
            yield status("Write a prompt."), *[gr.skip()] * 4
            return
        options = options_of(default, seed=seed_of(seed))
        turns, note = [Turn("user", (prompt,))], "The picture that was given"
        segments: tuple[Segment, ...] = () if path is None else (desk.read(path),)
        if not segments:
            for progress in desk.run(request, NAME, [(turns, options)]):
                note = progress.note
                yield status(note), *[gr.skip()] * 4
            segments = progress.drafts[0].segments
        pictures = [segment for segment in segments if isinstance(segment, Image.Image)]
        if not pictures:
            yield status(f"{note}: there is no whole picture to look into"), *[gr.skip()] * 4
            return
        with _turn(free):
            seen = microscope.look([*turns, Turn("assistant", segments)])
        specimen = Specimen(seen, pictures[-1], options, draws(options.seed, seen.latents))
        yield status(note), specimen, *show(specimen, place, layer)

    return look


@contextlib.contextmanager
def _turn(free: threading.Semaphore) -> Iterator[None]:
    """Raises gr.Error where others compute for too long."""
    if not free.acquire(timeout=WAIT_SECONDS):
        raise told("Too many people look inside just now. Try again in a moment.")
    try:
        yield
    finally:
        free.release()


def draws(seed: int, latents: Tensor) -> Tensor:
    """The noise `(L, C)` of the first picture of a request with likeliest words: its own generator, latent by latent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(latents.shape[1], generator=generator) for _ in latents]).to(latents.device)


def _shower(microscope: Microscope, free: threading.Semaphore) -> Any:
    def show(specimen: Specimen | None, place: float, layer: float) -> list[str]:
        if specimen is None:
            return [gr.skip()] * 3
        with _turn(free):
            return [
                entropy_html(microscope, specimen, int(place)),
                trajectory_html(microscope, specimen, int(place)),
                attention_html(specimen, int(place), None if layer == ALL_LAYERS else int(layer)),
            ]

    return show


def entropy_html(microscope: Microscope, specimen: Specimen, place: int) -> str:
    if microscope.model.latent_embedding.kind == "linear":
        return "<h3>Soft assignment</h3><p>This checkpoint embeds latents with a linear map and has no codebook.</p>"
    assignment = microscope.assignment(specimen.look.latents)
    bits = entropy_bits(assignment)
    best, code = assignment[place].max(-1)
    most = torch.log2(torch.tensor(float(assignment.shape[-1])))
    words = (
        f"Patch {place}: {bits[place]:.2f} of at most {most:.2f} bits, as many as {2 ** bits[place]:.0f} codes in equal parts; "
        f"the likeliest is code {int(code)} with {best:.1%}. All patches: {bits.min():.2f} to {bits.max():.2f} bits."
    )
    titles = [f"patch {index}: {value:.2f} bits" for index, value in enumerate(bits.tolist())]
    return (
        "<h3>How sure is each patch of its code?</h3>"
        f'<div class="pair">{img(specimen.picture, "the picture", PICTURE_PIXELS)}'
        f"{heat(specimen.picture, bits - bits.min(), titles, place, 'entropy of the assignment of each patch')}</div>"
        f'<p>{words}</p><p class="note">A latent is embedded as a mixture of codebook entries (eq. 4). Colour: entropy of that '
        "mixture, from the surest patch (clear) to the least sure (full).</p>"
    )


def trajectory_html(microscope: Microscope, specimen: Specimen, place: int) -> str:
    sampling = specimen.options.sampling
    look, noise = specimen.look, specimen.noise[place]
    states = microscope.trajectory(look, place, noise, specimen.options.guidance, sampling)
    chosen = sorted({round(i * (len(states) - 1) / (MAX_STATES - 1)) for i in range(MAX_STATES)})
    patches = microscope.patches(look, place, states[chosen])
    away = (states - states[-1]).square().mean(-1).sqrt().tolist()
    cells = "".join(
        f"<figure>{img(patch, f'patch after {step} steps', PATCH_PIXELS)}"
        f"<figcaption>{step}<br>{away[step]:.2f}</figcaption></figure>"
        for step, patch in zip(chosen, patches, strict=True)
    )
    gap = float((states[-1] - look.latents[place]).abs().max())
    end = "It ends at the latent that stands in the picture." if gap < 1e-3 else f"It ends {gap:.2f} away from the given latent."
    return (
        f'<h3>From noise to latent {place}</h3><div class="strip">{cells}</div><p>{end}</p>'
        '<p class="note">The patch decoded after each evaluation of the diffusion head; below it the step and the distance to '
        "the end (RMS over channels).</p>"
    )


def attention_html(specimen: Specimen, place: int, layer: int | None) -> str:
    look = specimen.look
    found = attended(look, place, layer)
    largest = max(found.words, default=0.0) or 1.0
    shares = {
        role: sum(w for w, r in zip(found.words, look.words.roles, strict=True) if r == role) for role in ("user", "assistant")
    }
    titles = [f"patch {index}: {value:.1%}" for index, value in enumerate(found.latents.tolist())]
    own = f"<p><b>What it said</b> ({shares['assistant']:.0%}): {_words(look.words, found, 'assistant', largest)}</p>"
    return (
        f"<h3>Where latent {place} looks</h3>"
        f"<p><b>Prompt</b> ({shares['user']:.0%}): {_words(look.words, found, 'user', largest)}</p>"
        f"{own if 'assistant' in look.words.roles else ''}"
        f"<p><b>Earlier patches</b> ({float(found.latents.sum()):.0%}), the rest {found.rest:.0%}:</p>"
        f"{heat(specimen.picture, found.latents, titles, place, 'attention to earlier patches')}"
        '<p class="note">Attention of the position that predicts this latent, mean over heads. It says where the model looks, '
        "not why.</p>"
    )


def _words(words: Words, found: Attended, role: str, largest: float) -> str:
    marks = []
    for text, owner, weight in zip(words.texts, words.roles, found.words, strict=True):
        if owner == role:
            share = round(100 * weight / largest)
            marks.append(f'<mark style="--share:{share}%" title="{weight:.1%}">{html.escape(text)}</mark>')
    return " ".join(marks)


def heat(picture: Image.Image, values: Tensor, titles: list[str], place: int, label: str) -> str:
    """A picture with one square per patch over it, the fuller the larger its value; the one at `place` is framed."""
    side, top = round(len(values) ** 0.5), float(values.max()) or 1.0
    squares = []
    for index, value in enumerate((values / top).tolist()):
        row, column = divmod(index, side)
        kind = ' class="here"' if index == place else ""
        squares.append(
            f'<rect{kind} x="{column}" y="{row}" width="1" height="1" fill-opacity="{0.75 * value:.2f}">'
            f"<title>{titles[index]}</title></rect>"
        )
    svg = f'<svg class="heat" viewBox="0 0 {side} {side}" role="img" aria-label="{label}">{"".join(squares)}</svg>'
    return f'<div class="frame">{img(picture, "the picture", PICTURE_PIXELS)}{svg}</div>'
