"""Checkpoints that a thread writes while training goes on: what they hold, and what a kill, an error or a full disk leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_sharding
import torch
from test_training import MUON, InterruptedRunError, assert_equal, logged, run_settings, tiny_lanes, tiny_model, weights
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from orthus.training import checkpoint, distributed
from orthus.training.checkpoint import Checkpoints, TrainState, latest
from orthus.training.fit import EXIT_TERMINATED, _sample, fit
from orthus.training.optim import start_ema

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TESTS = Path(__file__).parent
Sampling = Callable[[nn.Module, int], None]


def train(folder: Path, num_steps: int, save_every: int, on_sample: Sampling | None = None, **changes: Any) -> None:
    """Two lanes, Muon; checkpoints in a thread unless `async_checkpoints` says otherwise."""
    settings = {"lanes": 2, "keep_checkpoints": 9, "log_every": 3, "sample_every": 1, "async_checkpoints": True, **changes}
    run = run_settings(folder, num_steps, save_every=save_every, **settings)
    fit(tiny_model(), tiny_lanes(), run, MUON, on_sample=on_sample)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def content(folder: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, and the other files as tensors of their bytes, without what the clock says."""
    reader = FileSystemReader(folder / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    marker = json.loads((folder / "complete.json").read_text())
    marker = {**marker, "seconds": 0, "window": {k: v for k, v in marker["window"].items() if k != "since"}}
    settings = [line for line in (folder / "settings.yaml").read_text().splitlines() if "async" not in line and "dir" not in line]
    texts = {"complete.json": json.dumps(marker), "settings.yaml": "\n".join(settings)}
    files = {name: torch.tensor(list(text.encode())) for name, text in texts.items()}
    lanes = {path.name: torch.tensor(torch.load(path)["position"]) for path in folder.glob("lane-*.pt")}
    assert len(tensors) > 30 and len(lanes) >= 2
    return tensors | files | lanes


def assert_same_checkpoints(found: Path, expected: Path) -> None:
    assert names(found) == names(expected) and len(names(found)) > 1
    for name in names(expected):
        assert_equal(content(found / "checkpoints" / name), content(expected / "checkpoints" / name))


def slow_save(before: Callable[[], object], after: Callable[[], object] = bool) -> Callable[..., Any]:
    """In the place of `checkpoint.save`, the function that writes the tensors."""
    write = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> Any:
        before()
        written = write(*args, **kwargs)
        after()
        return written

    return save


def test_training_goes_on_and_the_checkpoint_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write begins when the next two steps are done: what is written is what a run that waits writes, bit for bit."""
    train(tmp_path / "waiting", 10, save_every=4, async_checkpoints=False)
    proceed, writer, seen = threading.Event(), [], []

    def before() -> None:
        assert proceed.wait(60), "training waited for the writer"
        proceed.clear()
        writer.append(threading.current_thread().name)

    def on_sample(model: nn.Module, step: int) -> None:
        seen.append((step, latest(tmp_path / "going")))
        if step in (6, 10):
            proceed.set()
        if step == 10:
            threading.Timer(0.5, proceed.set).start()  # for the save of this last step

    monkeypatch.setattr(checkpoint, "save", slow_save(before))
    train(tmp_path / "going", 10, save_every=4, on_sample=on_sample)
    assert [found for step, found in seen if step <= 6] == [None] * 6  # under its name when all of it is there
    assert len(writer) == 3 and all(name.startswith("checkpoint") for name in writer)
    assert_same_checkpoints(tmp_path / "going", tmp_path / "waiting")
    assert_equal(weights(tmp_path / "going"), weights(tmp_path / "waiting"))
    assert logged(tmp_path / "going") == logged(tmp_path / "waiting")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_training_overwrites_is_copied_first(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, since memory is used again."""
    monkeypatch.setattr(checkpoint, "save", slow_save(lambda: time.sleep(0.1)))
    model = nn.Linear(300, 300, device=device)
    state = TrainState(model, {}, [], {})
    expected = []
    with Checkpoints(tmp_path, {}, keep=9, is_async=True) as checkpoints:
        for state.step in range(3):
            expected.append(model.weight.detach().cpu().clone())
            checkpoints.save(state)
            with torch.no_grad():
                model.weight.mul_(-2)
    for step, weight in enumerate(expected):
        stored = {"model.weight": torch.zeros(300, 300)}
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        load(stored, storage_reader=FileSystemReader(folder / "tensors"), no_dist=True)
        assert torch.equal(stored["model.weight"], weight)


def test_a_kill_while_a_checkpoint_is_written_goes_on_from_the_one_before(tmp_path: Path) -> None:
    code = "import sys, pathlib, test_checkpoints_async as t; t.killed_while_writing(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == -signal.SIGKILL
    assert names(tmp_path / "killed") == [".step-00000006.tmp", "step-00000003"]
    train(tmp_path / "killed", 9, save_every=3)
    train(tmp_path / "whole", 9, save_every=3)
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def killed_while_writing(folder: Path) -> None:
    """Dies in step 8, when the tensors of step 6 are on the disk and the rest is not."""
    written, is_second = threading.Event(), threading.Event()

    def after() -> None:
        if is_second.is_set():
            written.set()
            time.sleep(60)
        is_second.set()

    def on_sample(model: nn.Module, step: int) -> None:
        if step == 8 and written.wait(60):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = slow_save(bool, after)
    train(folder, 9, save_every=3, on_sample=on_sample)


def test_whatever_ends_the_run_waits_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", slow_save(lambda: time.sleep(0.3)))

    def on_sample(model: nn.Module, step: int) -> None:
        if step == 5 and not is_asked:
            raise InterruptedRunError
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    is_asked = False
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "error", 9, save_every=4, on_sample=on_sample)
    assert names(tmp_path / "error") == ["step-00000004"]
    is_asked = True
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "asked", 9, save_every=4, on_sample=on_sample)
    assert ended.value.code == EXIT_TERMINATED and names(tmp_path / "asked") == ["step-00000004", "step-00000005"]


def test_a_full_disk_ends_the_run_soon_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """As in test_training; the error comes in the step after the thread met it, not at the next save."""
    train(tmp_path, 2, save_every=2, log_every=1)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
        with pytest.raises(OSError, match=r"step-00000004 could not be written .* goes on from .*step-00000002"):
            train(tmp_path, 4, save_every=4, log_every=1)  # at the end of the run
        steps: list[int] = []

        def on_sample(model: nn.Module, step: int) -> None:
            steps.append(step)
            time.sleep(0.01)

        with pytest.raises(OSError, match="step-00000003 could not be written"):
            train(tmp_path, 3000, save_every=3, log_every=2000, on_sample=on_sample)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000002"]
    train(tmp_path, 6, save_every=2, log_every=1)
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, 7))


def test_an_error_is_noticed_before_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    steps: list[int] = []

    def on_sample(model: nn.Module, step: int) -> None:
        steps.append(step)
        time.sleep(0.05)

    monkeypatch.setattr(checkpoint, "save", refuse)
    with pytest.raises(OSError, match=r"step-00000004 could not be written \(no space left\).*goes on from the beginning"):
        train(tmp_path, 1000, save_every=4, on_sample=on_sample)
    assert steps[-1] < 8 and names(tmp_path) == []


def process(index: int, world_size: int, folder: str, plan: Any) -> None:
    """As in test_sharding, with a slow writer; in the second process there is no room for the last run. Then one draws long."""
    begin = checkpoint._begin

    def begin_or_refuse(temporary: Path) -> None:
        begin(temporary)
        if index == 1 and "full" in str(temporary):
            raise OSError("no space left")

    checkpoint._begin = begin_or_refuse
    checkpoint.save = slow_save(lambda: time.sleep(0.2))
    train_one = test_sharding.train

    def train(folder: Path, num_steps: int, **changes: Any) -> None:
        if "full" not in folder.name:
            return train_one(folder, num_steps, **changes)
        with pytest.raises(OSError, match=r"step-00000002 could not be written \(no space left\)"):
            train_one(folder, num_steps, **changes)
        return None

    test_sharding.train = train  # type: ignore[assignment]
    test_sharding.process(index, world_size, folder, plan)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/patient", rank=index, world_size=world_size)
    state = TrainState(nn.Linear(1, 1), {}, [], {}, waiting=distributed.waiting_group())
    torch.distributed.set_timeout(timedelta(seconds=0.5))
    _sample(state, lambda model, step: time.sleep(1.5))  # longer than the others wait where nothing is drawn
    torch.distributed.destroy_process_group()


def test_two_processes_write_the_shards_of_one_step(tmp_path: Path) -> None:
    """FSDP2 on gloo; what fails in one process fails in both."""
    sharded = {"is_orthus": True, "sharding": "full"}
    in_thread = {**sharded, "async_checkpoints": True}
    plan = [("waiting", 3, sharded), ("going", 3, in_thread), ("waiting-whole", 3, {})]
    plan += [("going-whole", 3, {"async_checkpoints": True}), ("full", 9, {"async_checkpoints": True})]
    test_sharding.start(process, (2, str(tmp_path), plan), 2, ["test_checkpoints_async"])
    assert_same_checkpoints(tmp_path / "going", tmp_path / "waiting")
    assert_same_checkpoints(tmp_path / "going-whole", tmp_path / "waiting-whole")
    assert names(tmp_path / "full") == []


def test_each_process_copies_a_part_and_nothing_that_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(8)))
    model[:2].requires_grad_(False)
    state = TrainState(model, start_ema(model), [], {})
    monkeypatch.setattr(checkpoint, "world_size", lambda: 3)
    found, sizes = [], []
    for number in range(3):
        monkeypatch.setattr(checkpoint, "rank", lambda number=number: number)
        changing, resting = checkpoint._to_write(state)
        assert all(name.startswith(("model.0.", "model.1.")) for name in resting)
        assert not any(name.startswith(("model.0.", "model.1.")) for name in changing)
        found += [*changing, *resting]
        sizes.append(sum(tensor.nbytes for tensor in (*changing.values(), *resting.values())))
    assert sorted(found) == sorted(checkpoint._tensors(state)) and max(sizes) - min(sizes) <= 20 * 20 * 4


# -- processes that torchrun starts again --------------------------------------------------------------------------


def test_processes_that_are_started_again_meet_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is that of the first time, and one process is later than the other by what an import may take."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    met: dict[tuple[int, int], str] = {}

    def meet(start: int, number: int, delay: float) -> None:
        time.sleep(delay)
        part = distributed._unused_part(TCPStore("localhost", server.port, is_master=False), number, 2)
        part.set(str(number), f"start {start}")
        met[start, number] = part.get(str(1 - number)).decode()

    for start, delays in enumerate(((0.0, 0.0), (0.0, 0.3), (0.3, 0.0))):
        threads = [threading.Thread(target=meet, args=(start, number, delay)) for number, delay in enumerate(delays)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert met == {(start, number): f"start {start}" for start in range(3) for number in range(2)}
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"process 0 of 2 waited 0\.2 s for the others"):
        distributed._unused_part(server, 0, 2)
    fresh = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # in which nobody else has been
    with pytest.raises(TimeoutError, match=r"process 0 of 2 waited 0\.2 s for the others; look for why one of them ended"):
        distributed._unused_part(fresh, 0, 2)
