"""The command line: ``fxsparse demo | trace | plan | report | bench | export | kernels``."""

import argparse
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

import fxsparse
from fxsparse import arguments, methods
from fxsparse.allocation import POLICIES
from fxsparse.arguments import UsageError
from fxsparse.budget import KINDS
from fxsparse.errors import FxSparseError
from fxsparse.exporting import FORMATS
from fxsparse.kernel import capabilities
from fxsparse.report import Report
from fxsparse.trace import capture
from fxsparse.transforms import TRANSFORMS

TABLES = ("table", "json", "markdown", "html")
METHODS = ", ".join(build.__name__.rstrip("_") for build in methods.METHODS)
EXAMPLES = """examples:
  fxsparse demo
  fxsparse trace torchvision:resnet50 --input 1x3x224x224
  fxsparse plan torchvision:resnet50 --sparsity 0.9 --input 1x3x224x224
  fxsparse plan torchvision:resnet50 --budget flops=0.3 --input 1x3x224x224
  fxsparse report my_package.models:build --plan plan.toml --input 8x128:int64 --format html -o report.html
  fxsparse bench torchvision:resnet18 --sparsity 0.9 --input 1x3x224x224
  fxsparse export torchvision:resnet18 --sparsity 0.9 --input 8x3x224x224 --to onnx -o resnet18.onnx
  fxsparse kernels
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 with one line on stderr that names the error."""
    options = parser().parse_args(words)
    try:
        output = getattr(options, "output", None)
        if output is not None:
            arguments.check_output(output)
        options.run(options)
    except (FxSparseError, OSError) as error:
        reason = " ".join(str(error).split())
        print(f"fxsparse: {type(error).__name__}: {reason}", file=sys.stderr)
        return 2
    return 0


def parser() -> ArgumentParser:
    """The commands and their options."""
    top = ArgumentParser(
        "fxsparse",
        description="Sparse training and sparse inference for PyTorch models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _demo(_command(commands, "demo", demo, "train three small models dense and sparse, and compare them"))
    traced = _command(
        commands, "trace", trace, "capture a model, and print its graph and how it was captured"
    )
    _model(traced)
    _output(traced, "text", "json")
    _plan(_command(commands, "plan", plan, "what a plan would do to every weight, without doing it"))
    _plan(
        _command(commands, "report", report, "compile a model for sparse training, and print what was done")
    )
    _plan(_command(commands, "bench", bench, "prune a model in one shot, and time it dense and sparse"))
    _export(_command(commands, "export", export, "write a model for another runtime"))
    _output(
        _command(commands, "kernels", kernels, "the kernels, and which of them run on this machine"), *TABLES
    )
    return top


def demo(options: Namespace) -> None:
    """``fxsparse demo``."""
    from fxsparse.demo.run import run

    run(Path(options.output), steps=options.steps, seed=options.seed, threads=options.threads)


def trace(options: Namespace) -> None:
    """``fxsparse trace``."""
    program = capture(arguments.model(options.model), arguments.examples(options.input))
    graphs = {mode: graph.print_readable(print_output=False) for mode, graph in program.graphs.items()}
    if options.format == "json":
        _write(
            json.dumps({"tier": program.tier, "notes": program.notes, "graphs": graphs}, indent=2),
            options.output,
        )
        return
    lines = [f"captured by the {program.tier} front end", *program.notes]
    shared = program.graphs["train"] is program.graphs["eval"]
    titles = {"train": "train and eval"} if shared else {"train": "train", "eval": "eval"}
    lines += [f"\n{title}:\n{graphs[mode]}" for mode, title in titles.items()]
    _write("\n".join(lines), options.output)


def plan(options: Namespace) -> None:
    """``fxsparse plan``."""
    wanted = arguments.plan(options)
    inputs = arguments.examples(options.input)
    _write_report(fxsparse.plan_report(arguments.model(options.model), wanted, inputs), options)


def report(options: Namespace) -> None:
    """``fxsparse report``."""
    wanted = arguments.plan(options)
    inputs = arguments.examples(options.input)
    sparse = fxsparse.compile(arguments.model(options.model), wanted, example_inputs=inputs)
    _write_report(sparse.report, options)


def bench(options: Namespace) -> None:
    """``fxsparse bench``."""
    wanted, inputs = arguments.plan(options), arguments.examples(options.input)
    if inputs is None:
        raise UsageError("bench: expected example inputs to time the model on, such as --input 1x3x224x224.")
    pruned = fxsparse.prune(arguments.model(options.model), wanted, inputs)
    _write_report(fxsparse.compile(pruned, mode="infer", example_inputs=inputs).report, options)


def export(options: Namespace) -> None:
    """``fxsparse export``."""
    inputs = arguments.examples(options.input)
    if inputs is None:
        raise UsageError("export: expected example inputs, such as --input 1x3x224x224.")
    words = arguments.plan_words(options)
    if options.checkpoint is not None and words:
        raise UsageError(
            f"export: expected --checkpoint, which is sparse already, or the options of a plan, got both: {words[0]}."
        )
    wanted = arguments.plan(options) if words else None
    model = arguments.model(options.model).eval()
    if options.checkpoint is not None:
        model = fxsparse.load(options.checkpoint, model).eval()
    elif wanted is not None:
        model = fxsparse.prune(model, wanted, inputs)
    compiled = isinstance(model, fxsparse.SparseModule) and model.plan is None
    if options.to != "onnx" and not compiled:
        model = fxsparse.compile(model, mode="infer", example_inputs=inputs)
    fxsparse.export(model, options.output, inputs, format=options.to)


def kernels(options: Namespace) -> None:
    """``fxsparse kernels``."""
    rows = capabilities()
    if options.format == "json":
        _write(json.dumps(rows, indent=2), options.output)
        return
    cells = [{k: ", ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    style = {"table": "simple", "markdown": "github", "html": "html"}[options.format]
    _write(tabulate(cells, headers="keys", tablefmt=style), options.output)


def _write_report(result: Report, options: Namespace) -> None:
    text = {
        "table": result.__str__,
        "json": result.to_json,
        "markdown": result.to_markdown,
        "html": result.to_html,
    }
    _write(text[options.format](), options.output)


def _write(text: str, output: str | None) -> None:
    if output is None:
        print(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")


def _command(commands: Any, name: str, run: Callable[[Namespace], None], summary: str) -> ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    return command


def _demo(command: ArgumentParser) -> None:
    command.add_argument("-o", "--output", default="fxsparse-report.html", help="where the HTML report goes")
    command.add_argument("--steps", type=int, default=400, help="training steps of every run (default: 400)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--threads", type=int, default=1, help="of the CPU, for training and timing (default: 1)"
    )


def _output(command: ArgumentParser, *formats: str) -> None:
    command.add_argument("--format", choices=formats, default=formats[0])
    command.add_argument("-o", "--output", metavar="FILE", help="write there instead of to the terminal")


def _model(command: ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="module:factory, or torchvision:resnet50")
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="an example input, such as 1x3x224x224 or 1x128:int64; once for each positional input",
    )


def _plan(command: ArgumentParser) -> None:
    _model(command)
    _output(command, *TABLES)
    _wanted(command)


def _export(command: ArgumentParser) -> None:
    _model(command)
    command.add_argument("--to", choices=FORMATS, default=FORMATS[0], help=f"(default: {FORMATS[0]})")
    command.add_argument("-o", "--output", metavar="FILE", required=True)
    command.add_argument("--checkpoint", metavar="FILE", help="what fxsparse.save wrote of this model")
    _wanted(command)


def _wanted(command: ArgumentParser) -> None:
    command.add_argument("--plan", help="a TOML file, or a preset such as rigl-90 or 2:4")
    command.add_argument("--sparsity", type=float, help="fraction of zeros, such as 0.9")
    command.add_argument(
        "--budget",
        metavar="KIND=SHARE",
        help=f"in place of a sparsity, a share of the dense model's {', '.join(KINDS)}",
    )
    command.add_argument("--method", help=f"one of {METHODS}, with the defaults of its paper")
    command.add_argument(
        "--transform",
        help=f"first make the model one of Sparse-IFT's: {', '.join(TRANSFORMS)}; with options as in a plan file: "
        "'sparse-parallel(adjust=true)'",
    )
    command.add_argument("--allocation", help=f"how weights share the budget: {', '.join(POLICIES)}")
    command.add_argument(
        "--pattern", help="unstructured, constant-fan-in, n:m such as 2:4, or a block such as 16x16"
    )
    command.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="weights that stay dense"
    )
