"""MME: `python -m eval.mme generate | grade | report | compare | export`, each with `--help`; `python -m eval.mme [FILE.yaml]
key=value ...` does the first three."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.commands import command_of, from_command_line, generate, shard, with_default_command
from eval.mme.grading import PARSERS
from eval.mme.results import grade_folder, table
from eval.whole_files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2, and nothing written, for input that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m eval.mme", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, text in (("generate", _generate, "answer the questions"), ("run", _run, "generate, grade and report")):
        command = commands.add_parser(name, help=text, add_help=False)
        command.add_argument("settings", nargs="*", help="[FILE.yaml] key=value ...")
        command.set_defaults(run=run)
    _add_grade(commands.add_parser("grade", help="score a folder of <subtask>.txt answer files"))
    _add_export(commands.add_parser("export", help="write a benchmark as one parquet file, as the copies on the hub are"))
    _add_report(commands.add_parser("report", help="a page with scores and samples of a run"))
    _add_compare(commands.add_parser("compare", help="a page with the differences of two runs"))
    arguments = parser.parse_args(with_default_command(sys.argv[1:] if argv is None else argv))
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _generate(arguments: argparse.Namespace) -> Any:
    from eval.mme.generate import Settings, answer, items_of  # the model needs torch, grading does not

    def ask(model: Any, processor: Any, settings: Settings) -> None:
        answer(model, processor, items_of(settings), settings)

    return generate(Settings, arguments.settings, "Answer MME's questions.", ask)


def _run(arguments: argparse.Namespace) -> None:
    settings = _generate(arguments)
    if settings is not None and shard()[0] == 0:
        from eval.mme.generate import ANSWERS

        print(table(grade_folder(Path(settings.output) / ANSWERS, settings.parser)))
        print(_page(settings))


def _page(settings: Any) -> Path:
    from eval.mme.report import write_report

    return write_report(settings, command_of("eval.mme"))


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="+", help="as for generate: [FILE.yaml] key=value ...")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from eval.mme.generate import Settings

    settings = from_command_line(Settings, arguments.settings, None)
    if settings is not None:
        print(_page(settings))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, help="output folder of a run")
    parser.add_argument("--parser", default="official", choices=tuple(PARSERS), help="how answers are read (official)")
    parser.add_argument("--html", type=Path, required=True, help="the page; beside it the numbers as JSON")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from eval.mme.report import compare

    compare(arguments.first, arguments.second, arguments.parser, command_of("eval.mme"), arguments.html)
    print(arguments.html)


def _add_grade(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="holds <subtask>.txt with: image, question, ground truth, answer")
    parser.add_argument("--parser", default="official", choices=tuple(PARSERS), help="how answers are read (official)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.set_defaults(run=_grade)


def _grade(arguments: argparse.Namespace) -> None:
    result = grade_folder(arguments.folder, arguments.parser)
    if arguments.json:
        write_json(arguments.json, result)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(table(result))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="small-world, a folder in the official layout, or a parquet file or folder")
    parser.add_argument("--output", type=Path, required=True, help="the parquet file")
    parser.add_argument("--num-images", type=int, default=100, help="small-world: pictures per subtask (100)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from eval.mme.items import open_items, small_world_items, write_parquet  # the data needs torch, grading does not

    is_small = arguments.source == "small-world"
    items = small_world_items(arguments.num_images) if is_small else open_items(Path(arguments.source))
    write_parquet(items, arguments.output)
    print(f"{len(items)} questions -> {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
