"""Shipped settings: each loads into its stage, those of the 7B model hold the published numbers, and launchers are sound."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.geneval import generate as geneval
from eval.mme import generate as mme
from orthus.configuration import OrthusConfig
from orthus.training.settings import load_settings
from train.autoencoder import AutoencoderStage
from train.distil import DistilStage
from train.posttrain import PostStage
from train.pretrain import BaseStage

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
LAUNCH = ROOT / "train" / "launch"
STAGES: dict[str, type] = {  # those that are not `PostStage`
    "7b/decoder.yaml": AutoencoderStage,
    "small/autoencoder.yaml": AutoencoderStage,
    "small/distil.yaml": DistilStage,
    "small/language.yaml": BaseStage,
    "scratch/1b.yaml": BaseStage,
}
EVALUATIONS: dict[str, Any] = {"geneval": geneval, "small_geneval": geneval, "mme": mme, "small_mme": mme}
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "eval")
PUBLISHED_STAGES = ("base", "instruct", "editing", "storybook")


def settings(name: str) -> Any:
    return load_settings(STAGES.get(name, PostStage), CONFIGS / name)


def rows_per_step(stage: Any) -> int:
    return int(stage.run.lanes * stage.data.rows_per_batch)


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_into_its_stage(name: str) -> None:
    stage = settings(name)
    assert stage.run.output_dir.startswith("runs/")
    with pytest.raises(ValueError, match=r"run\.num_steps"):
        load_settings(STAGES.get(name, PostStage), CONFIGS / name, ["run.num_setps=7"])
    assert not Path(getattr(stage, "model", "") if isinstance(getattr(stage, "model", ""), str) else "").is_absolute()
    for source in getattr(getattr(stage, "data", stage), "sources", ()):
        assert source.path.startswith("data/") and (source.images or "data/").startswith("data/"), source


@pytest.mark.parametrize("path", sorted((CONFIGS / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_evaluation_loads_into_its_settings(path: Path) -> None:
    settings_type = EVALUATIONS[path.stem].Settings
    found = load_settings(settings_type, path, ["model=m", "output=o"])
    assert (found.model, found.output) == ("m", "o")
    with pytest.raises(ValueError, match="missing key 'model', 'output'"):
        load_settings(settings_type, path)


def test_the_table_names_files_that_exist() -> None:
    assert set(STAGES) <= set(FILES) and {f"7b/{name}.yaml" for name in PUBLISHED_STAGES} <= set(FILES)


def test_the_decoder_stage_is_the_published_one() -> None:
    stage = settings("7b/decoder.yaml")
    assert stage.frozen == ("encoder", "quant_conv") and stage.size == 512 and stage.batch_size * stage.run.lanes == 256
    assert (stage.optim.peak_lr, stage.run.num_steps) == (1e-5, 15_000)


@pytest.mark.parametrize("name", PUBLISHED_STAGES)
def test_what_all_stages_of_the_7b_model_share(name: str) -> None:
    stage = settings(f"7b/{name}.yaml")
    assert (stage.optim.optimizer, stage.optim.betas) == ("adamw", (0.9, 0.99))
    run = stage.run
    assert (run.sharding, run.checkpoint_activations, run.autocast, run.device) == ("full", True, "bfloat16", "cuda")
    assert run.sample_every == 0  # a sharded model is never whole
    assert all(run.lanes % processes == 0 for processes in (2, 4, 8))
    assert "autoencoder" in stage.frozen and stage.lora is None and stage.head is None
    comments = (CONFIGS / f"7b/{name}.yaml").read_text()
    for chosen in ("weight_decay", "warmup_steps", "clip_norm", "ema_decay"):
        line = next(line for line in comments.splitlines() if chosen in line)
        assert "not published" in line, line


def test_the_published_base_stage() -> None:
    stage = settings("7b/base.yaml")
    assert (stage.optim.peak_lr, stage.run.num_steps, rows_per_step(stage)) == (1e-4, 15_000, 32)
    assert set(stage.frozen) == {
        "autoencoder",
        "backbone.layers",
        "backbone.norm",
        "lm_head",
    }  # codebook, embeddings and head train
    assert [source.kind for source in stage.data.sources] == ["webdataset"]
    assert stage.data.drop == {"t2i": 1.0}  # image-only sequences
    shortest = 1024 + 6
    assert stage.data.row_length // shortest == 1, "one picture a row: the batch is 32 pictures"


def test_the_published_instruct_stage() -> None:
    stage = settings("7b/instruct.yaml")
    assert (stage.optim.peak_lr, stage.run.num_steps, rows_per_step(stage)) == (1e-5, 35_000, 16)
    assert stage.frozen == ("autoencoder",) and stage.data.row_length == 4096
    assert [source.label for source in stage.data.sources] == ["llava", "journeydb", "laion"]
    assert stage.model == settings("7b/base.yaml").run.output_dir + "/final"
    assert OrthusConfig().image_loss_weight == 100  # where lambda is


@pytest.mark.parametrize(("name", "kind"), [("editing", "editing"), ("storybook", "interleaved")])
def test_the_stages_after_the_base(name: str, kind: str) -> None:
    stage, instruct = settings(f"7b/{name}.yaml"), settings("7b/instruct.yaml")
    assert (stage.model, stage.frozen, stage.optim.peak_lr) == (instruct.model, instruct.frozen, instruct.optim.peak_lr)
    assert (rows_per_step(stage), stage.data.row_length) == (16, 4096)
    assert [source.kind for source in stage.data.sources] == [kind]


def test_a_model_from_scratch() -> None:
    stage = settings("scratch/1b.yaml")
    assert rows_per_step(stage) * stage.data.row_length == 2**19
    assert stage.backbone["max_position_embeddings"] >= stage.data.row_length


# ---------------------------------------------------------------------- launchers


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_of_launchers(file: Path) -> None:
    parts = list(yaml.safe_load_all(file.read_text()))
    assert parts and all(isinstance(part, dict) for part in parts)
    if file.name != "kubernetes.yaml":
        return
    job = parts[1]["spec"]
    pod = job["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert job["completions"] == job["parallelism"] == int(variables["NODES"])
    assert pod["subdomain"] == parts[0]["metadata"]["name"] and parts[0]["spec"]["selector"] == {
        "job-name": parts[1]["metadata"]["name"]
    }
    script = pod["containers"][0]["args"][0]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    load_settings(PostStage, ROOT / pod["containers"][0]["args"][-1])


def test_no_path_or_host_of_anybody() -> None:
    for file in (*LAUNCH.iterdir(), *CONFIGS.rglob("*.yaml")):
        text = file.read_text()
        for word in ("/home/", "/work/", "/mnt/", "/root/", "://", "docker.io", "ghcr.io", "nvcr.io"):
            assert word not in text, (file, word)


def make_programs(folder: Path, programs: dict[str, str]) -> None:
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


TORCHRUN = """#!/usr/bin/env bash
echo "$OMP_NUM_THREADS $*" >> "$PWD/calls"
if [ "$BEHAVIOUR" = run ]; then exit 0; fi
trap 'echo saved >> "$PWD/saved"; exit 1' TERM
touch "$PWD/up-$4"
while true; do sleep 0.1; done
"""


@pytest.mark.parametrize(("behaviour", "code"), [("run", 0), ("wait", 143)])
def test_ssh_reaches_every_host_and_passes_sigterm_on(tmp_path: Path, behaviour: str, code: int) -> None:
    """With a shell in place of ssh and a script in place of torchrun."""
    torchrun, ssh = tmp_path / "torchrun", tmp_path / "ssh"
    make_programs(tmp_path, {"torchrun": TORCHRUN, "ssh": '#!/usr/bin/env bash\nshift\nexec bash -c "$1"\n'})
    given = {"HOSTS": "one two", "SSH": str(ssh), "TORCHRUN": str(torchrun), "PROCESSES": "2", "BEHAVIOUR": behaviour}
    command = ["bash", str(LAUNCH / "ssh.sh"), "train.posttrain", "a b.yaml", "data.sources=[{kind: text}]"]
    started = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **given}, stderr=subprocess.PIPE, text=True)
    try:
        if behaviour == "wait":
            while started.poll() is None and len(list(tmp_path.glob("up-*"))) < 2:
                time.sleep(0.05)
            started.terminate()
        _, said = started.communicate(timeout=20)
    finally:
        started.kill()
    assert started.returncode == code, said
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert len(calls) == 2
    for rank, call in enumerate(calls):
        assert call.endswith(f"--nnodes 2 --node-rank {rank} --nproc-per-node 2 --max-restarts 3 --master-addr one "
                             "--master-port 29500 -m train.posttrain a b.yaml data.sources=[{kind: text}]")  # fmt: skip
    assert not list((tmp_path / "runs").iterdir())
    if behaviour == "wait":
        assert (tmp_path / "saved").read_text() == "saved\nsaved\n"


SRUN = """#!/usr/bin/env bash
echo "$*" > "$PWD/call"
echo $BASHPID > "$PWD/number"
trap 'sleep 0.3; echo saved > "$PWD/saved"; exit 1' TERM
[ "$BEHAVIOUR" != run ] || exit 0
[ "$BEHAVIOUR" != fail ] || exit 5
touch "$PWD/up"
while true; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then seq -f "node%g" 5000; else echo "$*" > "$PWD/requeued"; fi
"""
SCANCEL = """#!/usr/bin/env bash
[ "$*" = "--signal=TERM 77" ] && kill -TERM "$(cat "$PWD/number")"
"""


@pytest.mark.parametrize(
    ("behaviour", "signal_number", "code", "is_requeued"),
    [
        ("run", None, 0, False),
        ("fail", None, 5, False),
        ("wait", signal.SIGUSR1, 143, True),
        ("wait", signal.SIGTERM, 143, False),
    ],
    ids=["run", "fail", "time-limit", "asked"],
)
def test_slurm_saves_and_queues_again(
    tmp_path: Path, behaviour: str, signal_number: int | None, code: int, is_requeued: bool
) -> None:
    """With scripts in place of SLURM's programs."""
    make_programs(tmp_path, {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL})
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BEHAVIOUR": behaviour, "SLURM_JOB_ID": "77", "SLURM_NNODES": "5000",
             "SLURM_JOB_NODELIST": "node[1-5000]", "SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(tmp_path)}  # fmt: skip
    command = ["bash", str(LAUNCH / "slurm.sh"), "train.posttrain", "a b.yaml"]
    started = subprocess.Popen(command, env={**os.environ, **given}, stderr=subprocess.PIPE, text=True)
    try:
        if signal_number is not None:
            while started.poll() is None and not (tmp_path / "up").exists():
                time.sleep(0.05)
            started.send_signal(signal_number)
        _, said = started.communicate(timeout=20)
    finally:
        started.kill()
    assert started.returncode == code, said
    call = (tmp_path / "call").read_text()
    assert "--nnodes 5000 --nproc-per-node 8" in call and "--rdzv-endpoint node1:20077 -m train.posttrain a b.yaml" in call
    assert (tmp_path / "saved").exists() == (signal_number is not None)
    assert (tmp_path / "requeued").exists() == is_requeued
