"""The app in a browser: `python -m demo.app checkpoints/orthus-small --port 7860`, with the HTTP API beside it under /v1."""

import hmac
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Mount

from demo.api import create_api
from demo.api_settings import Settings
from demo.app_desk import Desk, quiet
from demo.app_files import Folder
from demo.app_guard import AppGuard
from demo.app_settings import Setting, connect
from demo.serve import end_in_order, serve
from demo.views import chat, client, draw, edit, inside, story
from orthus.serving import Engine

FOLDER = Path(__file__).parent
TABS = (("Chat", chat), ("Draw", draw), ("Edit", edit), ("Story", story), ("Inside", inside))
MAX_EVENTS = 256  # clicks that wait for a worker; what waits for the model is counted by the engine
FONT = ["system-ui", "sans-serif"]  # nothing is fetched
HERO = """# Orthus
One transformer that reads and writes text and pictures. {name}: pictures of {size} pixels, {count} latents each."""


def build_app(desk: Desk) -> gr.Blocks:
    """The tabs, wired to the desk and to the address of the page."""
    width = desk.engine.model.config.autoencoder_config.image_size
    settings: list[Setting] = []
    with gr.Blocks(title="Orthus", analytics_enabled=False) as blocks:
        name = desk.settings.model_name
        gr.Markdown(HERO.format(name=name, size=f"{width} x {width}", count=desk.num_latents), elem_classes="hero")
        with gr.Tabs(selected=chat.NAME):
            for label, view in TABS:
                with gr.Tab(label, id=view.NAME, elem_id=view.NAME, render_children=True) as tab:
                    settings += view.build(desk)
                tab.select(None, None, None, js=f"() => orthus.tab('{view.NAME}')", api_visibility="private")
        client.build(desk)
        connect(blocks, settings)
        blocks.unload(_left(desk))
    blocks.queue(max_size=MAX_EVENTS, default_concurrency_limit=None)
    return blocks


def _left(desk: Desk) -> object:
    def left(request: gr.Request) -> None:
        """A page that is closed frees its rows."""
        desk.stop(request)

    return left


def create_app(engine: Engine, settings: Settings, folder: Path) -> FastAPI:
    """API and app in one; Gradio keeps its files under `folder`."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    app = create_api(engine, settings)
    stored = Folder(folder)
    blocks = build_app(Desk(engine, settings, stored))
    quiet(blocks)
    stored.keep()
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        auth=_password(settings.token) if settings.token else None,
        auth_message="The name may be anything; the password is the server's token.",
        max_file_size=settings.max_image_bytes,
        show_error=False,
        footer_links=["api", "settings"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", font=FONT, font_mono=["ui-monospace", "monospace"]),
        head=_head(),
    )
    app.state.blocks = blocks
    blocks.has_launched = True  # else Gradio opens any path that a request names
    api, is_known = app.state.api, _visitor(app, settings)
    app.add_middleware(AppGuard, folder=stored, settings=settings, is_closing=lambda: api.is_closing, is_known=is_known)
    return app


def _visitor(app: FastAPI, settings: Settings) -> Callable[[Request], bool]:
    """Whether a request carries the cookie that Gradio gives for the password."""
    mounted: Any = next(route.app for route in app.routes if isinstance(route, Mount))

    def is_known(request: Request) -> bool:
        names = (f"access-token-{mounted.cookie_id}", f"access-token-unsecure-{mounted.cookie_id}")
        return settings.token is None or any(request.cookies.get(name) in mounted.tokens for name in names)

    return is_known


def _head() -> str:
    """Style and script of the page; as `css` the style would come late, and rewritten."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    return f"<style>{style}</style><script>{script}</script>"


def _password(token: str) -> object:
    def is_known(name: str, password: str) -> bool:
        return hmac.compare_digest(password.encode("utf-8", "replace"), token.encode())

    return is_known


def main(argv: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="orthus-app-") as folder:

        def create(engine: Engine, settings: Settings) -> FastAPI:
            return create_app(engine, settings, Path(folder))

        serve(argv, "The app in a browser, and the HTTP API beside it.", 7860, create, " (API under /v1)")


if __name__ == "__main__":
    end_in_order(main)
