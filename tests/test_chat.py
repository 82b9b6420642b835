"""`demo.chat`: several turns, commands, pictures saved and shown, and what a user can do wrong."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import SIZE, FakeEngine, color_of
from PIL import Image

from demo import chat
from demo.chat import Chat, as_terminal, terminal_kind
from orthus.serving import PromptTooLong

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"


@pytest.fixture
def talk(tmp_path: Path) -> tuple[Chat, Callable[[str], str]]:
    conversation = Chat(FakeEngine(), tmp_path / "pictures", None, seed=5, screen=io.StringIO())  # type: ignore[arg-type]

    def say(line: str) -> str:
        conversation.screen = io.StringIO()
        assert conversation.hear(line)
        return conversation.screen.getvalue()

    return conversation, say


def test_several_turns_are_remembered_and_forgotten(talk: Any) -> None:
    conversation, say = talk
    assert say("abc") == "cba\n" and say("de").startswith("ed")
    assert [turn.segments for turn in conversation.engine.requests[-1][0]] == [("abc",), ("cba",), ("de",)]
    assert say("/new") == "forgotten\n" and say("f") == "f\n" and len(conversation.engine.requests[-1][0]) == 1


def test_pictures_are_attached_drawn_and_saved(talk: Any, tmp_path: Path) -> None:
    conversation, say = talk
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red one.png")
    assert "attached" in say(f"/image {tmp_path}/red one.png")
    shown = say("/draw a star")
    turns, options, _ = conversation.engine.requests[-1]
    assert isinstance(turns[0].segments[0], Image.Image) and options.image_guidance == 1.0 and options.seed == 5
    (path,) = (tmp_path / "pictures").iterdir()
    assert str(path) in shown and Image.open(path).getpixel((0, 0)) == color_of("a star", 5)
    assert not conversation.attached and conversation.seed == 6
    say("/seed 9")
    say("again")
    assert conversation.engine.requests[-1][1].seed == 9 and conversation.engine.requests[-1][1].force_image
    say("/chat b")
    assert not conversation.engine.requests[-1][1].force_image


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image nowhere.png", "error: no image file"),
        ("/image", "error:"),
        ("/seed x", "error: seed 'x'"),
        ("/seed 99999999999999999999", "from 0 to 9223372036854775807"),
        ("/seed " + "9" * 5000, "from 0 to 9223372036854775807"),
        ("/what", "/image FILE"),
    ],
)
def test_mistakes_are_told(talk: Any, line: str, words: str) -> None:
    assert words in talk[1](line)


def test_damaged_pictures_are_told(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "error: cannot read" in talk[1](f"/image {tmp_path}/a.png")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, say = talk

    def interrupted(event: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "_finish", lambda *values: interrupted(values))
    assert say("abc").endswith("\nstopped\n") and conversation.engine.jobs[0].is_cancelled
    conversation.attached = [Image.new("RGB", (8, 8))]
    assert "pictures are detached" in say("abc") and not conversation.attached


def test_a_failed_answer_does_not_end_the_conversation(talk: Any) -> None:
    conversation, say = talk
    say("abc")
    assert "error: secret prompt; the conversation is as before" in say("crash")
    say("de")
    assert [turn.segments for turn in conversation.engine.requests[-1][0]] == [("abc",), ("cba",), ("de",)]


def test_a_full_conversation_names_the_way_out(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, say = talk

    def refuse(*values: Any) -> Any:
        raise PromptTooLong("too long", 300, 256)

    monkeypatch.setattr(conversation.engine, "submit", refuse)
    assert "300 of 256 positions" in (said := say("abc")) and "/new" in said


def test_a_picture_that_cannot_be_saved_is_told(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file where the folder should be")
    assert "cannot save the picture" in talk[1]("/draw a star") and talk[0].engine.jobs[0].is_cancelled


def test_the_last_seed_is_followed_by_the_first(talk: Any) -> None:
    conversation, say = talk
    say(f"/seed {2**63 - 1}")
    assert "error" not in say("abc") and conversation.seed == 0
    with pytest.raises(SystemExit):
        chat.main(["nowhere", "--seed", "-1"])


@pytest.mark.parametrize(
    ("environment", "is_terminal", "kind"),
    [
        ({"KITTY_WINDOW_ID": "1"}, True, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, True, "iterm"),
        ({"COLORTERM": "truecolor"}, True, "blocks"),
        ({"TERM": "vt100"}, True, None),
        ({"KITTY_WINDOW_ID": "1"}, False, None),
    ],
)
def test_terminals(environment: dict[str, str], is_terminal: bool, kind: str | None) -> None:
    assert terminal_kind(environment, is_terminal) == kind


def test_pictures_as_control_sequences() -> None:
    picture = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
    blocks = as_terminal(picture, "blocks").splitlines()
    assert len(blocks) == chat.SHOWN_CELLS // 2 and blocks[0].count("▀") == chat.SHOWN_CELLS and "38;2;1;2;3m" in blocks[0]
    assert as_terminal(picture, "iterm").startswith("\x1b]1337;File=inline=1")
    noise = Image.effect_noise((64, 64), 99).convert("RGB")
    pieces = as_terminal(noise, "kitty").strip().split("\x1b\\")[:-1]
    assert len(pieces) > 1 and pieces[0].startswith("\x1b_Ga=T,f=100,m=1;") and pieces[-1].startswith("\x1b_Gm=0;")


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint")
def test_the_shipped_checkpoint_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = iter(["/draw a photo of a red circle", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main([str(CHECKPOINT), "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert Image.open(path).size == (64, 64) and str(path) in capsys.readouterr().out
