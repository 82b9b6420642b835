"""Answers are the same to the byte however many processes gave them, and whatever was killed on the way."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from eval.answers import Decoding, Request, ask, item_seed, read_records, stored_answers

REQUESTS = [Request(f"{n:02d}/0", (f"draw {n}",)) for n in range(11)]


class Batch(dict):
    def to(self, device: Any) -> Batch:
        return self


class Processor:
    separator_token_id = 1

    def __call__(self, turns: Any) -> Batch:
        return Batch(prompts=[row[0].segments[0] for row in turns])

    def decode_segments(self, output: Any) -> Any:
        return output.answers


class Painter:
    """Words and noise of each request's own generator, mixed with what else is in its batch, as rounding does."""

    device = torch.device("cpu")

    def __init__(self, fail_after: int = 10**9, kill: bool = False) -> None:
        self.calls, self.fail_after, self.kill = itertools.count(1), fail_after, kill

    def generate(self, prompts: list[str], generator: list[torch.Generator], **_: Any) -> Any:
        if next(self.calls) > self.fail_after:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        beside = sum(len(prompt) for prompt in prompts)
        drawn = [torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8) + beside for g in generator]
        answers = [[prompt, Image.fromarray(pixels.numpy())] for prompt, pixels in zip(prompts, drawn, strict=True)]
        return SimpleNamespace(sequences=torch.ones(len(prompts), 1, dtype=torch.long), answers=answers)


def run(folder: Path, model: Painter | None = None) -> None:
    ask(model or Painter(), Processor(), "t", REQUESTS, Decoding("image"), folder, seed=3, batch_size=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def process(index: int, world_size: int, folder: str, killed: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}.rendezvous-{world_size}-{killed}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=index, world_size=world_size)
    run(Path(folder), Painter(fail_after=1, kill=True) if killed and index == 1 else None)
    dist.destroy_process_group()


def spawn(folder: Path, world_size: int, killed: bool = False) -> None:
    multiprocessing.set_forkserver_preload(["test_answers"])
    mp.start_processes(process, args=(world_size, str(folder), killed), nprocs=world_size, start_method="forkserver")


def test_one_two_and_three_processes_and_a_killed_one(tmp_path: Path) -> None:
    run(tmp_path / "one")
    wanted = contents(tmp_path / "one")
    assert len(wanted) == len(REQUESTS) + 1 and "t.jsonl" in wanted
    spawn(tmp_path / "two", 2)
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        spawn(tmp_path / "three", 2, killed=True)
    kept = len(list((tmp_path / "three" / "images").iterdir()))
    assert 0 < kept < len(REQUESTS)
    with pytest.raises(ValueError, match="unfinished run"):
        stored_answers(tmp_path / "three", "t", REQUESTS)
    spawn(tmp_path / "three", 3)
    assert contents(tmp_path / "two") == contents(tmp_path / "three") == wanted


def test_an_interrupted_run_asks_only_what_lacks(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Painter(fail_after=2))
    with (tmp_path / "t.rank00000.jsonl").open("a") as file:
        file.write('{"key": "04/0", "seg')  # cut short by a kill
    painter = Painter()
    run(tmp_path, painter)
    assert next(painter.calls) == 5  # of six batches two were done
    assert list(read_records(tmp_path / "t.jsonl")) == [request.key for request in REQUESTS]
    run(tmp_path / "whole")
    assert (tmp_path / "t.jsonl").read_bytes() == (tmp_path / "whole" / "t.jsonl").read_bytes()


def test_damage_is_named_and_mended_by_asking_again(tmp_path: Path) -> None:
    run(tmp_path)
    wanted = contents(tmp_path)
    broken = tmp_path / "images" / "t-03_0-1.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t-03_0-1.png is missing, cut short or was changed.*generate again"):
        _ = stored_answers(tmp_path, "t", REQUESTS)["03/0"].pictures
    run(tmp_path)
    assert contents(tmp_path) == wanted
    lines = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join(lines[:4] + lines[5:]))
    with pytest.raises(ValueError, match=r"10 answers to 11 requests \(1 lack: 04/0\)"):
        stored_answers(tmp_path, "t", REQUESTS)
    (tmp_path / "t.jsonl").write_text("".join([*lines[:4], "{}\n", *lines[5:]]))
    with pytest.raises(ValueError, match="line 5 is not an answer"):
        run(tmp_path)


def test_other_requests_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"answers other t requests \('09/0' is not asked now\)"):
        ask(Painter(), Processor(), "t", REQUESTS[:9], Decoding("image"), tmp_path, batch_size=2)


def test_keys_that_share_a_picture_file_are_refused_before_asking(tmp_path: Path) -> None:
    painter = Painter()
    requests = [Request("a/b", ("x",)), Request("a_b", ("y",))]
    with pytest.raises(ValueError, match=r"'a/b' and 'a_b' would share the file images/t-a_b-0\.png"):
        ask(painter, Processor(), "t", requests, Decoding("image"), tmp_path)
    with pytest.raises(ValueError, match="'a_b' and 'a_b' would share"):
        ask(painter, Processor(), "t", [requests[1], requests[1]], Decoding("interleaved"), tmp_path)
    assert next(painter.calls) == 1 and not list(tmp_path.iterdir())
    ask(painter, Processor(), "t", requests, Decoding("image"), tmp_path, place=lambda key, number: f"{key}/{number}.png")
    assert (tmp_path / "a/b/1.png").is_file() and (tmp_path / "a_b/1.png").is_file()


def test_seeds_depend_on_what_is_asked_alone() -> None:
    assert len({item_seed(*asked) for asked in ((0, "t", "1"), (0, "t", "2"), (1, "t", "2"), (0, "u", "1"))}) == 4


def test_pictures_of_requests_may_be_read_late() -> None:
    read = Request("a", (lambda: Image.new("RGB", (2, 3)), "b")).read()
    assert isinstance(read[0], Image.Image) and read[0].size == (2, 3) and read[1] == "b"
