"""How many processes there are, and whether they share the weights, changes nothing: gloo, on the CPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_model as tiny_orthus
from safetensors.torch import load_file
from test_training import logged, run_settings, tiny_lanes, weights
from test_training import tiny_model as tiny_stand_in

from orthus.adapters import add_lora
from orthus.modeling import OrthusForConditionalGeneration
from orthus.training.checkpoint import latest
from orthus.training.distributed import joined
from orthus.training.evaluation import Evaluation
from orthus.training.fit import fit
from orthus.training.optim import freeze
from orthus.training.settings import OptimSettings

TESTS = Path(__file__).parent
LANES, STEPS = 4, 4
ADAMW = OptimSettings(peak_lr=1e-2, warmup_steps=2, decay_fraction=0.0)
MUON = OptimSettings(optimizer="muon", peak_lr=1e-2, warmup_steps=2)
ALONE = ("is_orthus", "frozen", "optim", "is_adapted", "eval_every")  # of a case, what does not shard
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"sharding": "full"},
    "sharded-muon": {"sharding": "full", "optim": MUON},
    "orthus": {"is_orthus": True},
    "orthus-sharded": {"is_orthus": True, "sharding": "full", "checkpoint_activations": True, "eval_every": 3},
    "orthus-frozen-sharded": {"is_orthus": True, "sharding": "full", "frozen": ("backbone.layers", "backbone.norm")},
    "orthus-table-frozen-sharded": {"is_orthus": True, "sharding": "full", "frozen": ("backbone.embed_tokens", "lm_head")},
    "orthus-offloaded": {"is_orthus": True, "sharding": "offload", "eval_every": 1},
    "orthus-lora-sharded": {"is_orthus": True, "sharding": "full", "is_adapted": True, "eval_every": 2},
}


class OrthusLoader:
    """Rows of text with or without a picture, packed two to a row: in some batches of a step nothing is drawn."""

    def __init__(self, lane: int, num_lanes: int) -> None:
        self.lane, self.num_lanes, self.position = lane, num_lanes, 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(1000 * (self.position * self.num_lanes + self.lane))
            text = torch.randint(8, 40, (2, 14), generator=generator)
            text[:, 0], text[:, 7] = 0, 0
            labels = text.clone()
            labels[:, 0], labels[:, 7] = -100, -100
            batch = {"input_ids": text, "position_ids": torch.arange(7).repeat(2, 2)}
            if (self.position + self.lane) % 3:  # begin-of-image, 4 latents, end-of-image in the first row
                text[0, 8:14] = torch.tensor([4, 7, 7, 7, 7, 5])
                labels[0, 8:14] = torch.tensor([-100, 7, 7, 7, 7, -100])
                batch["image_latents"] = torch.randn(1, 4, 3, generator=generator)
            self.position += 1
            yield {**batch, "labels": labels}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train(folder: Path, num_steps: int = STEPS, is_orthus: bool = False, frozen: Sequence[str] = (), **changes: Any) -> None:
    optim = changes.pop("optim", ADAMW)
    parts = {"text_config": changes.pop("text_config")} if "text_config" in changes else {}
    model = tiny_orthus(head={"num_noise_draws": 2}, **parts) if is_orthus else tiny_stand_in()
    freeze(model, ["autoencoder", *frozen] if is_orthus else frozen)
    if changes.pop("is_adapted", False):
        torch.manual_seed(3)
        add_lora(model, rank=2)
    run = run_settings(folder, num_steps=num_steps, lanes=LANES, log_every=1, save_every=2, eval_batches=3, **changes)
    evaluation = Evaluation(lambda lane, num_lanes: OrthusLoader(1000 + lane, 2000)) if run.eval_every else None
    fit(model, OrthusLoader if is_orthus else tiny_lanes(2), run, optim, evaluation=evaluation)


def process(index: int, world_size: int, folder: str, plan: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/rendezvous-{world_size}-{os.getppid()}-{plan[0][0]}-{plan[0][1]}"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=world_size)
    for name, num_steps, changes in plan:
        train(Path(folder) / name, num_steps, **changes)
    dist.destroy_process_group()


def spawn(world_size: int, folder: Path, plan: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    start(process, (world_size, str(folder), plan), world_size, ["test_sharding"])


def start(run: Callable[..., None], args: tuple[Any, ...], num_processes: int, modules: list[str]) -> None:
    """`run(index, *args)` in new processes, for which a server imports the modules once."""
    multiprocessing.set_forkserver_preload(modules)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS, TESTS.parent)))  # Python 3.11's server knows no other places
    mp.start_processes(run, args=args, nprocs=num_processes, start_method="forkserver")


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses and gradient norms to 1e-4 relative, weights to 2e-4 absolute: the order of summation is all that differs.
    Muon, which orthogonalises in bf16: 2e-3 and 5e-3."""
    tolerance, drift = (2e-3, 5e-3) if "muon" in found.name else (1e-4, 2e-4)
    for one, other in zip(logged(found), logged(expected), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=1e-6), (found.name, one, other)
    stored, wanted = (load_file(folder / "final" / "model.safetensors") for folder in (found, expected))
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name != "num_forwards":
            torch.testing.assert_close(stored[name], tensor, rtol=2e-3, atol=drift, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in one process, without sharding."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in CASES.items():
        train(folder / name, **{key: changes[key] for key in ALONE if key in changes})
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_and_shards_change_nothing(world_size: int, alone: Path, tmp_path: Path) -> None:
    spawn(world_size, tmp_path, [(name, STEPS, changes) for name, changes in CASES.items()])
    for name in CASES:
        assert_same_run(tmp_path / name, alone / name)
    model = OrthusForConditionalGeneration.from_pretrained(tmp_path / "orthus-sharded" / "final")  # a plain folder
    assert model.lm_head.weight.shape == (64, 32)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """2 sharded, then 4 sharded, then 4 whole, then 1: the losses are those of the uninterrupted run."""
    sharded = {"is_orthus": True, "sharding": "full"}
    train(tmp_path / "whole", 8, is_orthus=True)
    spawn(2, tmp_path, [("moved", 2, sharded)])
    spawn(4, tmp_path, [("moved", 4, sharded), ("moved", 6, {"is_orthus": True})])
    train(tmp_path / "moved", 8, is_orthus=True)
    assert len(list((latest(tmp_path / "moved") or tmp_path).glob("lane-*.pt"))) == LANES
    whole = [record["loss"] for record in logged(tmp_path / "whole")]
    assert [record["loss"] for record in logged(tmp_path / "moved")] == pytest.approx(whole, rel=2e-3)
    assert len(weights(tmp_path / "moved")) > 20


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """torchrun with two processes, one of which is killed while it trains: it starts both again, and they go on."""
    (tmp_path / "run.py").write_text("import sys, pathlib, test_sharding\ntest_sharding.killed(pathlib.Path(sys.argv[1]))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command = [*launcher, str(tmp_path / "run.py"), str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert ended.returncode == 0 and (tmp_path / "out" / "killed").exists(), ended.stderr.decode()[-3000:]
    assert ended.stderr.count(b"resumed from") == 1
    train(tmp_path / "alone", 8, is_orthus=True)
    assert_same_run(tmp_path / "out", tmp_path / "alone")


def killed(folder: Path) -> None:
    """Eight sharded steps; the first time, the second process kills itself in the fifth."""
    mark, count = folder / "killed", itertools.count(1)
    if os.environ["RANK"] == "1" and not mark.exists():
        original = OrthusForConditionalGeneration.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(count) > 4 * LANES // 2:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        OrthusForConditionalGeneration.forward = forward  # type: ignore[method-assign]
    with joined():
        torch.set_num_threads(1)
        train(folder, 8, is_orthus=True, sharding="full", async_checkpoints=True)


def test_what_cannot_be_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs processes to shard over; start with torchrun"):
        train(tmp_path / "alone", sharding="full")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda is not available here; use device=cpu"), joined("cuda"):
            pass
    monkeypatch.setattr("orthus.training.fit.world_size", lambda: 3)
    with pytest.raises(ValueError, match="4 lanes cannot be shared by 3 processes; set run.lanes"):
        train(tmp_path / "three")
