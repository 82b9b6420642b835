"""A conversation in the terminal: `python -m demo.chat checkpoints/orthus-small`.

/image FILE  attach a picture to the next message     /draw  draw what the next messages say     /chat  answer as it likes
/seed N      seed of the next answer                  /new   forget everything                   /quit  (or Ctrl-D)
Ctrl-C stops an answer. Pictures go to a folder, and onto the screen where the terminal can.
"""

import argparse
import base64
import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from PIL import Image

from demo.defaults import default_options
from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.data.schema import Segment, Turn
from orthus.image_processing import load_image
from orthus.serving import Done, Engine, PromptTooLong, RequestFailed
from orthus.streaming import ImagePreview, TextPiece

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # line editing and history for input(); not on Windows

SHOWN_CELLS = 32  # columns of a picture in half-block characters
KITTY_CHUNK = 4096
NUM_SEEDS = 1 << 63


def terminal_kind(environment: Mapping[str, str], is_terminal: bool) -> str | None:
    """How pictures can be shown: "kitty", "iterm", "blocks" (24-bit colours) or None."""
    if not is_terminal:
        return None
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    return "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else None


def as_terminal(picture: Image.Image, kind: str) -> str:
    """Control sequences that show a picture: kitty's and iTerm2's graphics protocols, or two pixels per character."""
    if kind == "blocks":
        return _as_blocks(picture)
    buffer = io.BytesIO()
    picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:{data}\x07\n"
    pieces = [data[start : start + KITTY_CHUNK] for start in range(0, len(data), KITTY_CHUNK)]
    heads = [("a=T,f=100," if not place else "") + f"m={int(place < len(pieces) - 1)}" for place in range(len(pieces))]
    return "".join(f"\x1b_G{head};{piece}\x1b\\" for head, piece in zip(heads, pieces, strict=True)) + "\n"


def _as_blocks(picture: Image.Image) -> str:
    height = max(2, 2 * round(SHOWN_CELLS * picture.height / picture.width / 2))
    pixels = picture.convert("RGB").resize((SHOWN_CELLS, height), Image.Resampling.BOX).load()
    assert pixels is not None
    lines = []
    for y in range(0, height, 2):
        cells = [(pixels[x, y], pixels[x, y + 1]) for x in range(SHOWN_CELLS)]
        lines.append("".join("\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*top, *bottom) for top, bottom in cells))  # type: ignore[misc]
    return "\x1b[0m\n".join(lines) + "\x1b[0m\n"


class Chat:
    """One conversation: what was said, what is attached, what comes next."""

    def __init__(self, engine: Engine, output: Path, kind: str | None, seed: int = 0, screen: TextIO | None = None) -> None:
        self.engine, self.output, self.kind, self.seed = engine, output, kind, seed
        self.screen = screen or sys.stdout
        self.turns: list[Turn] = []
        self.attached: list[Segment] = []
        self.task = "chat"
        self.num_saved = 0

    def hear(self, line: str) -> bool:
        """One line of the user; False when it ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/new":
            self.turns, self.attached = [], []
            self._say("forgotten\n")
        elif command == "/image":
            self._attach(rest)
        elif command in ("/draw", "/chat"):
            self.task = command[1:]
            if rest:
                self.answer(rest)
        elif command == "/seed":
            self._set_seed(rest)
        elif command.startswith("/"):
            self._say(__doc__ or "")
        elif command:
            self.answer(line.strip())
        return True

    def answer(self, text: str) -> None:
        """Send what is attached and `text`, show the answer while it forms, remember both."""
        asked = Turn("user", (*self.attached, text))
        task = "edit" if self.task == "draw" and self.attached else self.task
        try:
            options = replace(default_options(task, self.engine.processor), seed=self.seed)
            # A drawing follows from its own message, which is what the defaults were measured with.
            job = self.engine.submit([asked] if self.task == "draw" else [*self.turns, asked], options)
        except PromptTooLong as error:
            shares = f"{error.length} of {error.limit} positions are taken and the answer does not fit behind them"
            self._say(f"error: this is too long: {shares}; say less, or /new and start again\n")
            return
        except ValueError as error:
            self._say(f"error: {error}\n")
            return
        try:
            for event in job.events():
                if isinstance(event, TextPiece):
                    self._say(event.text)
                elif isinstance(event, ImagePreview) and event.is_final:
                    self._show(event.picture)
                elif isinstance(event, Done):
                    self._finish(asked, event)
        except KeyboardInterrupt:
            job.cancel()
            self._say("\nstopped, pictures are detached\n" if self.attached else "\nstopped\n")
            self.attached = []
        except RequestFailed as error:
            self._say(f"\nerror: {error.__cause__ or error}; the conversation is as before, say it again or something else\n")
        except OSError as error:
            job.cancel()
            self._say(f"\nerror: cannot save the picture: {error}; make room in {self.output} and say it again\n")

    def _finish(self, asked: Turn, done: Done) -> None:
        self._say("\n" if done.answer.finish_reason == "stop" else f"\n[{done.answer.finish_reason}]\n")
        self.attached = []
        if done.answer.segments:
            self.turns += [asked, Turn("assistant", done.answer.segments)]
        self.seed = (self.seed + 1) % NUM_SEEDS

    def _show(self, picture: Image.Image) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.num_saved += 1
        path = self.output / f"{self.num_saved:03d}-seed{self.seed}.png"
        picture.save(path)
        self._say(f"\n{as_terminal(picture, self.kind) if self.kind else ''}[{path}]\n")

    def _attach(self, name: str) -> None:
        try:
            self.attached.append(load_image(Path(name).expanduser()))
            self._say(f"attached {name}\n")
        except (OSError, ValueError) as error:
            self._say(f"error: {error}\n")

    def _set_seed(self, number: str) -> None:
        if number.isdecimal() and len(number) <= len(str(NUM_SEEDS)) and int(number) < NUM_SEEDS:
            self.seed = int(number)
        else:
            self._say(f"error: seed {number[:40]!r} is not a whole number from 0 to {NUM_SEEDS - 1}, e.g. /seed 7\n")

    def _say(self, text: str) -> None:
        self.screen.write(text)
        self.screen.flush()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="A conversation with a checkpoint in the terminal.")
    parser.add_argument("checkpoint", help="folder of a saved model and processor")
    parser.add_argument("--output", default="runs/chat", help="where pictures are saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < NUM_SEEDS:
        parser.error(f"--seed {args.seed} is not from 0 to {NUM_SEEDS - 1}")
    model = OrthusForConditionalGeneration.from_pretrained(args.checkpoint).eval().to(args.device)
    processor = OrthusProcessor.from_pretrained(args.checkpoint)
    with Engine(model, processor, max_rows=1) as engine:
        chat = Chat(engine, Path(args.output), terminal_kind(os.environ, sys.stdout.isatty()), args.seed)
        print(__doc__)
        is_going = True
        while is_going:
            try:
                is_going = chat.hear(input("> "))
            except (EOFError, KeyboardInterrupt):
                is_going = False


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
