"""The loop's promises: accumulated = whole, two processes = one, resumed = uninterrupted, a kill loses nothing."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_model import DIM, TinyLoader, TinyModel
from torch import Tensor, nn

from orthus.training.checkpoint import MARKER, Checkpoints, TrainState, latest, load_checkpoint
from orthus.training.fit import EXIT_TERMINATED, fit
from orthus.training.metrics import read_metrics
from orthus.training.optim import build_optimizers, start_ema
from orthus.training.settings import OptimSettings, RunSettings

FAST = OptimSettings(peak_lr=1e-2, warmup_steps=2)
MUON = OptimSettings(optimizer="muon", peak_lr=1e-2, warmup_steps=2)


def run_settings(folder: Path, num_steps: int = 8, **changes) -> RunSettings:
    return RunSettings(**{"output_dir": str(folder), "num_steps": num_steps, "log_every": 2, "num_threads": 1, **changes})


def tiny_model(noise_scale: float = 1.0) -> TinyModel:
    torch.manual_seed(1)
    return TinyModel(noise_scale)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def logged(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_metrics(folder / "metrics.jsonl")]


def tiny_lanes(rows: int = 4) -> Callable[[int, int], TinyLoader]:
    return lambda lane, num_lanes: TinyLoader(rows, lane, num_lanes)


class InterruptedRunError(RuntimeError):
    """Ends a run as a crash would, without a checkpoint."""


# -- the loss of a step is the same however it is computed ---------------------------------------------------------


def test_accumulated_equals_whole(tmp_path: Path) -> None:
    """Ragged target counts: a mean of means would differ by percents; the tolerance is fp32 summation order."""
    for name, rows, lanes in (("whole", 8, 1), ("parts", 2, 4)):
        run = run_settings(tmp_path / name, num_steps=5, lanes=lanes, log_every=1)
        fit(tiny_model(noise_scale=0.0), tiny_lanes(rows), run, FAST)
    for whole, parts in zip(logged(tmp_path / "whole"), logged(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, rel=2e-4)
    for name, whole in weights(tmp_path / "whole").items():
        if name != "num_forwards":
            torch.testing.assert_close(weights(tmp_path / "parts")[name], whole, rtol=1e-3, atol=2e-5)


def two_processes(index: int, folder: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=2)
    model = tiny_model(noise_scale=0.0) if index == 0 else TinyModel(noise_scale=0.0)  # the second one must be told
    fit(model, tiny_lanes(4), run_settings(Path(folder), num_steps=3, log_every=1), MUON)
    fit(model, tiny_lanes(4), run_settings(Path(folder), num_steps=5, log_every=1), MUON)  # resumes in both processes
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two gloo processes with half of each batch; the second half of the run resumes a two-process checkpoint."""
    fit(tiny_model(noise_scale=0.0), tiny_lanes(8), run_settings(tmp_path / "one", num_steps=3, log_every=1), MUON)
    fit(tiny_model(noise_scale=0.0), tiny_lanes(8), run_settings(tmp_path / "one", num_steps=5, log_every=1), MUON)
    mp.spawn(two_processes, args=(str(tmp_path / "two"), str(tmp_path / "rendezvous")), nprocs=2)
    assert len(list((latest(tmp_path / "two") or tmp_path).glob("lane-*.pt"))) == 2
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    for name, one in weights(tmp_path / "one").items():
        if name != "num_forwards":
            torch.testing.assert_close(weights(tmp_path / "two")[name], one, rtol=1e-2, atol=1e-3)


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [FAST, MUON], ids=["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, optim: OptimSettings) -> None:
    """Weights, EMA, noise drawn in the forward, loader position and logged losses, with a save inside a log window."""

    def interrupt(model: nn.Module, step: int) -> None:
        torch.rand(3), random.random()  # what a sample draws must not touch the run
        if step == 7:
            raise InterruptedRunError

    run = run_settings(tmp_path / "whole", num_steps=10, lanes=2, save_every=5, log_every=3)
    fit(tiny_model(), tiny_lanes(), run, optim)
    broken = run_settings(tmp_path / "broken", num_steps=10, lanes=2, save_every=5, log_every=3, sample_every=1)
    with pytest.raises(InterruptedRunError):
        fit(tiny_model(), tiny_lanes(), broken, optim, on_sample=interrupt)
    assert (latest(tmp_path / "broken") or tmp_path).name == "step-00000005"
    torch.manual_seed(99)
    fit(TinyModel(), tiny_lanes(), broken, optim)  # other initial weights: all must come from the checkpoint
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    states = []
    for name in ("whole", "broken"):
        model = TinyModel()
        loaders = {lane: TinyLoader(4, lane, 2) for lane in range(2)}
        state = TrainState(model, start_ema(model), build_optimizers(model, optim), loaders, 2)
        load_checkpoint(state, latest(tmp_path / name) or "")
        slots = [value for o in state.optimizers for kept in o.state.values() for value in kept.values()]
        positions = {f"lane {lane}": torch.tensor(loader.position) for lane, loader in state.loaders.items()}
        states.append({**model.state_dict(), **{str(i): slot for i, slot in enumerate(slots)}, **positions})
    assert len(states[0]) > 30
    assert_equal(*states)


def test_complete_run_says_so_and_a_longer_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2), FAST)
    before = weights(tmp_path)
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2), FAST)
    assert "is complete at step 2" in capsys.readouterr().err
    assert_equal(before, weights(tmp_path))
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=4), FAST)
    said = capsys.readouterr().err
    assert "resumed from" in said
    assert "changed since: run.num_steps 2 -> 4" in said
    assert not torch.equal(before["lm_head.weight"], weights(tmp_path)["lm_head.weight"])
    assert [record["step"] for record in logged(tmp_path)] == [2, 4]


def test_a_longer_run_that_dies_before_its_model_is_written_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2), FAST)
    before = weights(tmp_path)
    with monkeypatch.context() as broken, pytest.raises(InterruptedRunError):
        broken.setattr("orthus.training.fit.save_model", lambda *_: (_ for _ in ()).throw(InterruptedRunError))
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=4), FAST)
    assert_equal(before, weights(tmp_path))
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=4), FAST)
    assert weights(tmp_path)["num_forwards"] == 4 and not torch.equal(before["codebook"], weights(tmp_path)["codebook"])


def command(folder: Path, num_steps: int) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; import test_training as t\n"
        "run = t.run_settings(Path(sys.argv[1]), num_steps=int(sys.argv[2]), save_every=1, log_every=1)\n"
        "t.fit(t.tiny_model(), t.tiny_lanes(), run, t.MUON)"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(num_steps)], env=environment, stderr=subprocess.DEVNULL)


def wait_for_first_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 240  # a busy machine needs a minute to import torch
    while latest(folder) is None:
        assert time.monotonic() < deadline, "the run wrote no checkpoint within 240 s"
        time.sleep(0.02)


def test_sigkill_while_saving_often_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """The run does little but save, so most kills hit a save; what is left resumes as if nothing had happened."""
    process = command(tmp_path, num_steps=1_000_000)
    wait_for_first_checkpoint(tmp_path)
    time.sleep(random.uniform(0.05, 0.6))
    process.kill()
    process.wait()
    newest = latest(tmp_path)
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=step + 2, log_every=1), MUON)
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, step + 3))
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    """Files may not grow beyond 4 kB, as on a disk that is full in the middle of a write; then there is room again."""
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2, log_every=1), MUON)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000004 could not be written .* goes on from .*step-00000002"):
            fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=6, save_every=2, log_every=1), MUON)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=6, save_every=2, log_every=1), MUON)
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, 7))


def test_sigterm_saves_and_exits(tmp_path: Path) -> None:
    process = command(tmp_path, num_steps=1_000_000)
    wait_for_first_checkpoint(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_TERMINATED
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == f"step-{logged(tmp_path)[-1]['step']:08d}"
    assert not (tmp_path / "final").exists()


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_half_written_checkpoints_are_ignored_and_old_ones_deleted(tmp_path: Path) -> None:
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=5, save_every=1, keep_checkpoints=2), FAST)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
    shutil.copytree(folder / "step-00000005", folder / ".step-00000006.tmp")
    shutil.copytree(folder / "step-00000005", folder / "step-00000007")
    (folder / "step-00000007" / MARKER).unlink()
    assert latest(tmp_path) == folder / "step-00000005"
    assert latest(tmp_path / "nowhere") is None


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_error_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a deletion that ends in the middle leaves nothing that passes for a whole checkpoint."""
    remove = shutil.rmtree

    def remove_half(path: Path, ignore_errors: bool = False) -> None:
        if "step-00000001" in path.name:
            remove(path / "tensors")
            raise OSError("stale file handle")
        remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", remove_half)
    with pytest.warns(UserWarning, match=r"step-00000001, .* not needed any more, could not be deleted \(stale file handle\)"):
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2, save_every=1, keep_checkpoints=1), FAST)
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".step-00000001.old", "step-00000002"]
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=3, save_every=1, keep_checkpoints=1), FAST)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def fresh_state(model: nn.Module, optim: OptimSettings = FAST) -> TrainState:
    return TrainState(model, start_ema(model), build_optimizers(model, optim), {0: TinyLoader()})


def test_checkpoint_that_does_not_fit_says_why(tmp_path: Path) -> None:
    fit(tiny_model(), tiny_lanes(), run_settings(tmp_path, num_steps=2), FAST)
    newest = latest(tmp_path) or Path()
    wider = TinyModel()
    wider.codebook = nn.Parameter(torch.zeros(5, DIM))
    with pytest.raises(ValueError, match=r"codebook.* of shape \(4, 8\) and the model wants \(5, 8\)"):
        load_checkpoint(fresh_state(wider), newest)
    longer = TinyModel()
    longer.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"lacks 4 tensors \(ema.extra.bias"):
        load_checkpoint(fresh_state(longer), newest)
    frozen = TinyModel()
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen parts as they were"):
        load_checkpoint(fresh_state(frozen), newest)
    with pytest.raises(ValueError, match=r"holds '.*' of 'backbone.layers.*\(Muon\)"):
        load_checkpoint(fresh_state(TinyModel(), MUON), newest)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_checkpoint(fresh_state(TinyModel()), tmp_path)
    tensors = newest / "tensors" / ".metadata"
    kept = tensors.read_bytes()
    tensors.write_bytes(kept[:100])
    with pytest.raises(ValueError, match="was written by torch .* cannot read it"):
        load_checkpoint(fresh_state(TinyModel()), newest)
    tensors.write_bytes(kept)
    marker = json.loads((newest / MARKER).read_text())
    (newest / MARKER).write_text(json.dumps({**marker, "lanes": 3}))
    with pytest.raises(ValueError, match="has 3 lanes and this run has 1.*set run.lanes=3"):
        load_checkpoint(fresh_state(TinyModel()), newest)


def test_loader_state_that_cannot_be_read_back_fails_at_the_save(tmp_path: Path) -> None:
    state = fresh_state(TinyModel())
    state.loaders[0].state_dict = lambda: {"source": Path()}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="plain Python values and tensors"):
        Checkpoints(tmp_path, {}, keep=1).save(state)
    assert latest(tmp_path) is None


# -- the loop ------------------------------------------------------------------------------------------------------


def test_not_finite_loss_stops_before_the_weights_move(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[3] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name != "lm_head.bias"}
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite .*sum/text nan"):
        fit(model, tiny_lanes(), run_settings(tmp_path), FAST)
    (saved,) = tmp_path.glob("not-finite-step-1-*.pt")
    assert torch.equal(torch.load(saved, weights_only=True)[0]["labels"], TinyLoader().batch(0)["labels"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_batches_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    loader = TinyLoader()
    loader.batch = lambda _: {  # type: ignore[method-assign]
        "input_ids": torch.zeros(1, 3, dtype=torch.int64),
        "labels": torch.full((1, 3), -100),
    }
    with pytest.raises(ValueError, match="no batch of the step has a target"):
        fit(tiny_model(), lambda lane, num_lanes: loader, run_settings(tmp_path / "a"), FAST)
    model = tiny_model()
    model.count_targets = lambda batch: {"text": 1, "image": 0}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="promised 1 targets and the forward counted"):
        fit(model, tiny_lanes(), run_settings(tmp_path / "b"), FAST)


def test_loss_weights_of_a_run_and_no_average(tmp_path: Path) -> None:
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    settings = {"loss_weights": {"text": 0.0}, "ema_decay": 0.0, "log_every": 1}
    fit(model, tiny_lanes(), run_settings(tmp_path, num_steps=2, **settings), OptimSettings(weight_decay=0.0))
    assert torch.equal(before, model.lm_head.weight) and torch.equal(weights(tmp_path)["codebook"], model.codebook)
    assert all(record["loss"] == pytest.approx(2 * record["loss/image"]) for record in logged(tmp_path))
    (stored,) = (latest(tmp_path) or tmp_path).glob("tensors/.metadata")
    assert b"ema." not in stored.read_bytes()
    with pytest.raises(ValueError, match="run.loss_weights names 'words'; the losses of TinyModel are text, image"):
        fit(tiny_model(), tiny_lanes(), run_settings(tmp_path / "b", loss_weights={"words": 1.0}), FAST)


def test_autocast_and_sampling_with_averaged_weights(tmp_path: Path) -> None:
    seen = []

    def on_sample(model: nn.Module, step: int) -> None:
        seen.append((step, model.training, model.lm_head.weight.detach().clone()))

    model = tiny_model()
    run = run_settings(tmp_path, num_steps=4, sample_every=2, autocast="bfloat16")
    fit(model, tiny_lanes(), run, FAST, on_sample=on_sample)
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    assert torch.equal(seen[-1][2], weights(tmp_path)["lm_head.weight"])
    assert not torch.equal(seen[-1][2], model.lm_head.weight)
    assert model.training


def test_training_learns(tmp_path: Path) -> None:
    """`(id + 1) % 11` from the id: with AdamW and with Muon the text loss falls from log(11) = 2.4 to below 1."""
    for name, optim in (("adamw", FAST), ("muon", MUON)):
        fit(tiny_model(), tiny_lanes(16), run_settings(tmp_path / name, num_steps=120, log_every=40), optim)
        assert logged(tmp_path / name)[-1]["loss/text"] < 1.0
