"""GenEval: `python -m eval.geneval generate | grade | report | compare | prompts | verdict | rescore | summary | selftest`, each
with `--help`; `python -m eval.geneval [FILE.yaml] key=value ...` does the first three."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.commands import command_of, generate, shard, with_default_command
from eval.geneval.detectors import HF_CLIP, HF_DETECTOR, Grader
from eval.geneval.official import OfficialScorer
from eval.geneval.prompts import OFFICIAL_DRAWS, OFFICIAL_SEED, write_prompts
from eval.geneval.records import Record, judge_record, read_lines, read_results, result_of, verdict_line, write_results
from eval.geneval.summary import published_summary, summary_table
from eval.whole_files import write_json, write_lines


def prompts(args: argparse.Namespace) -> None:
    print(f"{write_prompts(args.output, args.seed, args.num_samples)} prompts in {args.output}")


def verdict(args: argparse.Namespace) -> None:
    write_lines(args.output, read_lines(args.records, verdict_line))


def rescore(args: argparse.Namespace) -> None:
    """Judge stored detections again, with other thresholds."""
    options = options_of(args)
    if args.output.exists():
        raise ValueError(f"{args.output} exists; name another file")

    def judged(record: Record) -> Record:
        return result_of(record["filename"], record["metadata"], judge_record(record, options or None))

    write_results(args.output, read_lines(args.records, judged))


def summary(args: argparse.Namespace) -> None:
    results = read_results(args.results)
    scores = published_summary(results, args.allow_partial)
    if args.json is not None:
        write_json(args.json, scores)
    print(summary_table(results, scores))


def selftest(args: argparse.Namespace) -> None:
    from eval.geneval.selftest import require_working_grader, require_working_scorer

    if args.detector == "official":
        require_working_scorer(_scorer(args))
    elif args.detector == "hf":
        require_working_grader(_grader(args))
    else:
        raise ValueError("the small world's detector knows no photographs; eval.small_world validates it on true scenes")
    print(f"{args.detector}: self-test passed")


def grade(args: argparse.Namespace) -> None:
    from eval.geneval.folders import read_folder
    from eval.geneval.grading import RESULTS, grade_folder
    from eval.geneval.official import grade_officially
    from eval.geneval.selftest import require_working_grader, require_working_scorer

    folder = read_folder(args.folder)
    rank, _ = shard()
    output = args.folder if args.output is None else args.output
    if args.detector == "official":
        scorer = _scorer(args)
        require_working_scorer(scorer)
        complete = grade_officially(folder, scorer, output)
    else:
        grader = _grader(args)
        if args.detector == "hf":
            require_working_grader(grader)
        complete = grade_folder(folder, grader, output)
    if complete:
        print(f"{len(folder.pictures)} pictures graded: {output / RESULTS}")
    else:
        print(f"process {rank}: own share graded, others are not done yet")


def draw(args: argparse.Namespace) -> None:
    _draw(args.settings)


def run(args: argparse.Namespace) -> None:
    """Draw, grade and report, with the detector of the settings."""

    def judge(settings: Any) -> None:
        options = ["grade", settings.output, "--detector", settings.detector, "--device", settings.loading.device]
        grade(arguments().parse_args(options))

    settings = _draw(args.settings, judge)
    if settings is not None and shard()[0] == 0:
        report(arguments().parse_args(["report", settings.output]))


def _draw(argv: Sequence[str], then: Callable[[Any], None] | None = None) -> Any:
    from eval.geneval.generate import Settings, prompt_set
    from eval.geneval.generate import draw as draw_all

    def ask(model: Any, processor: Any, settings: Settings) -> None:
        draw_all(model, processor, *prompt_set(settings.prompts, settings.num_per_task, settings.held_out), settings)

    return generate(Settings, argv, "Draw the pictures of GenEval's prompts.", ask, then)


def report(args: argparse.Namespace) -> None:
    from eval.geneval.report import write_report

    page = write_report(args.folder, command_of("eval.geneval"), args.per_kind)
    results = read_results(args.folder / "results.jsonl")
    print(summary_table(results, published_summary(results, allow_partial=True)))
    print(page)


def compare(args: argparse.Namespace) -> None:
    from eval.geneval.report import compare as compare_runs

    compare_runs(args.first, args.second, command_of("eval.geneval"), args.html, args.per_kind)
    print(args.html)


def _grader(args: argparse.Namespace) -> Grader:
    if args.detector == "world":
        from eval.geneval.world import world_grader

        if args.options:
            raise ValueError(f"--options {args.options} change nothing of the small world's grader")
        return world_grader()
    from eval.geneval.hf import hf_grader

    return hf_grader(args.detector_model, args.clip_model, device_of_process(args.device), options_of(args))


def device_of_process(device: str) -> str:
    """Under torchrun each process has a GPU of its own. Raises `ValueError` where one GPU is named for several processes."""
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {device} names one GPU for all processes; use --device cuda")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _scorer(args: argparse.Namespace) -> OfficialScorer:
    if not (args.official_python and args.official_repo and args.model_path):
        raise ValueError("the official detector needs --official-python, --official-repo and --model-path")
    return OfficialScorer(args.official_python, args.official_repo, args.model_path, args.model_config, options_of(args))


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """`--options name=value ...` as published. Raises `ValueError` for a word without "="."""
    wrong = [word for word in args.options if "=" not in word]
    if wrong:
        raise ValueError(f"option {wrong[0]!r} is not name=value")
    return dict(word.split("=", 1) for word in args.options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.geneval", description="GenEval, the published protocol")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("prompts", help="write the published prompt files")
    command.add_argument("--seed", type=int, default=OFFICIAL_SEED)
    command.add_argument("--num-samples", type=int, default=OFFICIAL_DRAWS, help="draws per task")
    command.add_argument("--output", type=Path, required=True, help="folder")
    command.set_defaults(run=prompts)

    command = commands.add_parser("verdict", help="judge pictures from their detections")
    command.add_argument("records", type=Path)
    command.add_argument("output", type=Path)
    command.set_defaults(run=verdict)

    command = commands.add_parser("rescore", help="results.jsonl from stored detections, with other options")
    command.add_argument("records", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
    command.set_defaults(run=rescore)

    command = commands.add_parser("summary", help="scores of a results.jsonl")
    command.add_argument("results", type=Path)
    command.add_argument("--allow-partial", action="store_true")
    command.add_argument("--json", type=Path, help="also write the scores here")
    command.set_defaults(run=summary)

    command = commands.add_parser("selftest", help="does the detector find what a known photograph shows?")
    _detector_arguments(command)
    command.set_defaults(run=selftest)

    command = commands.add_parser("grade", help="grade a folder of generated pictures")
    command.add_argument("folder", type=Path)
    command.add_argument("--output", type=Path, help="where detections and results go (default: the folder itself)")
    _detector_arguments(command)
    command.set_defaults(run=grade)

    _add_run_commands(commands)
    return parser


def _add_run_commands(commands: Any) -> None:
    """Those that begin with a model's settings, and those that read what they left."""
    for name, action, text in (("generate", draw, "draw the pictures"), ("run", run, "generate, grade and report")):
        command = commands.add_parser(name, help=text, add_help=False)
        command.add_argument("settings", nargs="*", help="[FILE.yaml] key=value ...")
        command.set_defaults(run=action)

    command = commands.add_parser("report", help="a page with scores, kinds of failure and samples of a graded folder")
    command.add_argument("folder", type=Path)
    _page_arguments(command)
    command.set_defaults(run=report)

    command = commands.add_parser("compare", help="a page with the differences of two graded folders on the same prompts")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--html", type=Path, required=True, help="the page; beside it the numbers as JSON")
    _page_arguments(command)
    command.set_defaults(run=compare)


def _page_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--per-kind", type=int, default=24, help="samples shown of each task and verdict (24)")


def _detector_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--detector", choices=("hf", "official", "world"), required=True)
    command.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="the published options")
    command.add_argument("--device", default="cpu", help="hf: cpu, cuda, cuda:0, ...")
    command.add_argument("--detector-model", default=HF_DETECTOR, help="hf: name or folder")
    command.add_argument("--clip-model", default=HF_CLIP, help="hf: name or folder")
    command.add_argument("--official-python", help="official: python of the scorer's environment")
    command.add_argument("--official-repo", type=Path, help="official: checkout of the published scorer")
    command.add_argument("--model-path", type=Path, help="official: folder of the detector's weights")
    command.add_argument("--model-config", type=Path, help="official: the detector's config, where it is not beside mmdet")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(with_default_command(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
