"""The app in a browser: `python -m demo.app checkpoints/orthus-small --port 7860`, with the HTTP API beside it under /v1."""

import argparse
import hmac
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio import networking

from demo.api import create_api
from demo.api_settings import Settings
from demo.app_desk import Desk
from demo.app_guard import AppGuard
from demo.app_settings import Setting, connect
from demo.serve import LOOPBACK, add_engine_options, load_engine, run, settings_of
from demo.views import chat, client, draw, edit, inside, story
from orthus.serving import Engine

FOLDER = Path(__file__).parent
TABS = (("Chat", chat), ("Draw", draw), ("Edit", edit), ("Story", story), ("Inside", inside))
FILE_SECONDS = 3600  # for which uploads and pictures for API clients are kept
CHECK_SECONDS = 600  # between two looks for files that are older
MAX_EVENTS = 256  # clicks that wait for a worker; what waits for the model is counted by the engine
FONT = ["system-ui", "sans-serif"]  # nothing is fetched
HERO = """# Orthus
One transformer that reads and writes text and pictures. {name}: pictures of {size} pixels, {count} latents each."""


def build_app(desk: Desk) -> gr.Blocks:
    """The tabs, wired to the desk and to the address of the page."""
    width = desk.engine.model.config.autoencoder_config.image_size
    settings: list[Setting] = []
    with gr.Blocks(title="Orthus", analytics_enabled=False, delete_cache=(CHECK_SECONDS, FILE_SECONDS)) as blocks:
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
    blocks = build_app(Desk(engine, settings))
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
    app.add_middleware(AppGuard, folder=folder, hosts=settings.allowed_hosts, is_closing=lambda: app.state.api.is_closing)
    return app


def _head() -> str:
    """Style and script of the page; as `css` the style would come late, and rewritten."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("app.css", "app.js"))
    return f"<style>{style}</style><script>{script}</script>"


def _password(token: str) -> object:
    def is_known(name: str, password: str) -> bool:
        return hmac.compare_digest(password.encode("utf-8", "replace"), token.encode())

    return is_known


def share(host: str, port: int) -> str:
    """A public address that leads here for a week, through Gradio's servers."""
    return networking.setup_tunnel(host, port, os.urandom(24).hex(), None, None)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="The app in a browser, and the HTTP API beside it.")
    add_engine_options(parser)
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also on a public address, through Gradio's servers; set a token")
    parser.add_argument("--shutdown-seconds", type=float, default=30.0, help="which running requests have after SIGTERM")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = settings_of(args)
    if (args.share or args.host not in LOOPBACK) and settings.token is None:
        print("warning: others can reach this server and there is no token: everybody may use it", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="orthus-app-") as folder, load_engine(args) as engine:
        app = create_app(engine, settings, Path(folder))
        print(f"{settings.model_name}: http://{args.host}:{args.port} (API under /v1)", flush=True)
        run(app, engine, args.host, args.port, seconds=args.shutdown_seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before the server has its own: end in order
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
