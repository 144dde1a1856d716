"""The command line. It alone prints, through process.py; results go to stdout, messages and progress to stderr.

Exit status: 0 all well, 1 the answer is no (diff: different; verify: a check failed), 2 a usage, recipe or checkpoint error,
3 published, but not known to survive a power cut, 128 + N ended by signal N (130 Ctrl-C, 143 SIGTERM).
"""

import gc
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click

from bam_merge import __version__
from bam_merge.errors import BamMergeError, DurabilityUncertain, OutputError, VerificationFailed
from bam_merge.paths import located, path_problem
from bam_merge.process import (
    PROBLEM_LENGTH,
    Stopped,
    complete_streams,
    escape_what_streams_lack,
    fail,
    lack_of_memory,
    print_result,
    stop_on_signals,
    tell,
)  # fmt: skip
from bam_merge.text import nearest, printable


class _UserPath(click.Path):
    """A path with `~` expanded, as the shell does not after --output=; an empty one is a usage error, and not the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            if problem := path_problem(value):
                self.fail(f"{printable(repr(value))}: {problem}", param, ctx)
            value = str(located(value)) if value.startswith("~") else value
        return super().convert(value, param, ctx)


class _DefaultMerge(click.Group):
    """A group for which `bam-merge recipe.yaml` is `bam-merge merge recipe.yaml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""  # a command stands first; a recipe may follow options, whose values may be any word
        named = self._recipe(first) or (first.startswith("-") and any(self._recipe(arg) for arg in args))
        if named and first not in self.commands:
            args = ["merge", *args]
        return super().parse_args(ctx, args)

    @staticmethod
    def _recipe(arg: str) -> bool:
        return arg.endswith((".yaml", ".yml")) or Path(arg).is_file()

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            hint = nearest(args[0], self.commands)
            ctx.fail(f"{args[0]!r} is neither a command nor a recipe file (.yaml){hint or '.'}")
        return super().resolve_command(ctx, args)


class _Tolerance(click.FloatRange):
    """A number from 0 on. Python also reads nan and inf, with which nothing, or everything, would be the same."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return found


@click.group(cls=_DefaultMerge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bam-merge")
def cli() -> None:
    """Build mixture-of-experts checkpoints (BAM, BTX, Sparse Upcycling) out of dense ones.

    \b
    bam-merge RECIPE.yaml           plan, merge and publish, the same as bam-merge merge RECIPE.yaml
    bam-merge plan RECIPE.yaml      show what would be made from what
    bam-merge inspect PATH          show what a model is, holds and costs
    bam-merge diff A B              compare two models, or branches with their seed
    """


@cli.command()
@click.argument("recipe", type=_UserPath())
@click.option("--output", type=_UserPath(), metavar="DIR", help="Write here instead of the recipe's output.path.")
@click.option("--force", is_flag=True, help="Replace an existing output folder that holds a saved model and nothing else.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, if there is one; nothing to do if it had finished.")
@click.option("--verify/--no-verify", default=True, help="Prove the result before it appears. Default: yes.")
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Worker threads. Default: one per processor, at most 8.")
@click.option("--dry-run", is_flag=True, help="Only show the plan, as bam-merge plan does.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity where a merge gives them, and record it in the manifest.")
def merge(recipe: str, output: str | None, dry_run: bool, **options: Any) -> None:
    """Carry out RECIPE and publish the merged checkpoint."""
    from bam_merge.planning.make import plan_file

    plan = plan_file(recipe)
    if dry_run:
        _show_plan(plan, output=output, workers=options["workers"])
        return
    for note in plan.notes:
        tell(f"bam-merge: {note}")
    _execute(plan, output, options)


@cli.command()
@click.argument("recipe", type=_UserPath())
@click.option("--tensors", metavar="GLOB", help="List every tensor whose name matches, layer by layer.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def plan(recipe: str, tensors: str | None, as_json: bool) -> None:
    """Show what RECIPE would make from what, its sizes, and the memory and disk it needs. Reads headers only."""
    from bam_merge.planning.make import plan_file

    plan = plan_file(recipe)
    if as_json:
        from bam_merge.values.threads import default_workers

        print_result(json.dumps(plan.document(default_workers()), indent=2))
        _check_place(plan, None)
    else:
        _show_plan(plan, tensors)


@cli.command()
@click.argument("path", type=_UserPath())
@click.option("--tensors", metavar="GLOB", help="Only the tensors whose name matches, each with how it was made.")
@click.option("--layer", type=click.IntRange(0), metavar="N", help="Only the tensors of this layer.")
@click.option("--where", metavar="SOURCE:GLOB", help="What became of these tensors of a merge's source, as in 'math:model.layers.7.*'.")
@click.option("--all", "every", is_flag=True, help="List every tensor, without folding equal layers and experts.")
@click.option("--stats", is_flag=True, help="Read the values: range, moments, oddities, duplicates, routers.")
@click.option("--as-bam", type=click.IntRange(1), metavar="N", help="What the mixtures of N such dense models would cost.")
@click.option("--top-k", type=click.IntRange(1), default=1, metavar="K", help="FFN experts per token, for --as-bam. Default: 1.")
@click.option("--context", type=click.IntRange(1), default=256, metavar="N", help="Tokens of the prompt that FLOPs are for. Default: 256.")
@click.option("--json", "as_json", is_flag=True, help="Print the inspection as one JSON document.")
def inspect(path: str, every: bool, as_json: bool, **options: Any) -> None:
    """Show what the model in PATH, a folder or a safetensors file, is, holds and costs. Reads headers only, unless --stats."""
    from bam_merge.inspecting.inspection import inspect as look

    gc.disable()  # it would walk the records of 100,000 tensors again and again, and there is nothing to free
    try:
        found = look(path, **options)
    finally:
        gc.enable()
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
        return
    from bam_merge.showing.inspection import inspection_text

    print_result(inspection_text(found, _terminal(), every, options["tensors"] is not None or options["layer"] is not None))


@cli.command()
@click.argument("models", type=_UserPath(), nargs=-1, required=True, metavar="A B | E1 E2 ...")
@click.option(
    "--seed", type=_UserPath(), metavar="S", help="Compare the branches E1 E2 ... with the seed S that they came from, and with each other."
)
@click.option("--tol", type=_Tolerance(), default=0.0, metavar="X", help="Tensors whose relative difference is at most X are the same.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only the tensors whose name or role matches; may be repeated.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out the tensors whose name or role matches; may be repeated.")
@click.option("--all", "every", is_flag=True, help="List every tensor that differs, and every one that was left out.")
@click.option("--html", type=_UserPath(dir_okay=False), metavar="FILE", help="Write the report as one page that needs no network.")
@click.option("--force", is_flag=True, help="Replace an existing FILE of --html.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def diff(models: tuple[str, ...], seed: str | None, every: bool, html: str | None, force: bool, as_json: bool, **options: Any) -> None:
    """Compare two models, or branches with their seed. A model is a folder, a safetensors file, or FOLDER#EXPERT of a mixture.

    Exit status: 0 the same, 1 different, 2 could not be compared.
    """
    if html is not None:
        from bam_merge.showing.page import check_free, write_report

        check_free(Path(html), force)
    found, show = _compared(models, seed, options)
    if html is not None:
        write_report(found, Path(html), force)
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
    else:
        print_result(show(found, _terminal(), every))
    if not found.equal:
        sys.exit(1)


def _compared(models: tuple[str, ...], seed: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The comparison or the drift, and what turns it into text."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it: the workers are threads enough
    if seed is None:
        if len(models) != 2:
            raise click.UsageError(f"{len(models)} model(s) given: two are compared, or branches with their seed after --seed S.")
        from bam_merge.comparing.two_models import diff as compare
        from bam_merge.showing.comparison import comparison_text

        return compare(*models, **options), comparison_text
    if given := [f"--{name}" for name in ("tol", "only", "ignore") if options[name]]:
        raise click.UsageError(f"{', '.join(given)}: not together with --seed.")
    from bam_merge.comparing.branches import drift
    from bam_merge.showing.drift import drift_text

    return drift(seed, models), drift_text


@cli.command()
@click.argument("folder", type=_UserPath())
@click.option("--recipe", type=_UserPath(), metavar="RECIPE", help="The recipe, when the sources are not found from the manifest.")
@click.option("--text", "texts", type=_UserPath(), multiple=True, metavar="FILE", help="Measure perplexity on this text; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@click.argument("more_texts", type=_UserPath(), nargs=-1, metavar="[FILE ...]")
def verify(folder: str, recipe: str | None, texts: tuple[str, ...], more_texts: tuple[str, ...], as_json: bool) -> None:
    """Check the merged FOLDER: its files, its bytes against the sources, and what it computes.

    After --text FILE, further FILEs may follow.
    """
    from bam_merge.planning.make import plan_file
    from bam_merge.showing.verification import report_tables
    from bam_merge.verifying.verification import verify as run

    if more_texts and not texts:
        raise click.UsageError(f"unexpected {more_texts[0]!r}; texts for perplexity come after --text.")
    report = run(folder, plan_file(recipe) if recipe else None, (*texts, *more_texts))
    if as_json:
        print_result(json.dumps(report.document(), indent=2, allow_nan=False))
    else:
        print_result(_terminal().text(*report_tables(report)))
    if not report.ok:
        sys.exit(1)


@cli.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from bam_merge.recipe.schema import schema as recipe_schema

    print_result(json.dumps(recipe_schema(), indent=2))


@cli.command()
@click.argument("folder", type=_UserPath(file_okay=False), default="demo")
@click.option("--force", is_flag=True, help="Replace an earlier demo in FOLDER.")
def demo(folder: str, force: bool) -> None:
    """Make four small dense checkpoints in FOLDER, merge them into a BAM mixture, prove it, run it. Offline, a few seconds."""
    from bam_merge.demo.demo import DEMO_TOKENS, continuation, make_demo
    from bam_merge.planning.make import plan_file

    recipe = make_demo(Path(folder), force)
    tell(f"Four small dense Llama checkpoints and the recipe are in {printable(folder)}.\n")
    plan = plan_file(recipe)
    _show_plan(plan)
    target = _execute(plan, None, {"force": True, "resume": False, "workers": None, "allow_nonfinite": False, "verify": True})
    ids = [1, 2, 3, 5, 8]
    command = f"python -m bam_merge.model {printable(str(target), 1000)} --ids '{' '.join(map(str, ids))}' --tokens {DEMO_TOKENS}"
    print_result(f"\nIts weights are random, so what it says is too. The reference model, as from {command}:")
    print_result(" ".join(map(str, continuation(target, ids, DEMO_TOKENS))))


def _terminal() -> Any:
    """What stdout can show: 80 columns, no colour and no escape where it is no terminal."""
    from bam_merge.showing.terminal import Terminal

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    unicode = (sys.stdout.encoding or "ascii").lower().startswith("utf")
    return Terminal(max(40, shutil.get_terminal_size().columns), colour, unicode)


def _execute(plan: Any, output: str | None, options: dict[str, Any]) -> Path:
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.publishing.publish import publish
    from bam_merge.showing.plan import merge_progress, result_text
    from bam_merge.showing.verification import verdict_text
    from bam_merge.values.threads import default_workers

    options["workers"] = options["workers"] or default_workers()
    reports: list[Any] = []

    def notify(text: str) -> None:
        tell(f"bam-merge: {printable(text, PROBLEM_LENGTH)}")

    with merge_progress(plan) as advance:
        try:
            target = publish(plan, output, MergeOptions(**options, notify=notify, progress=advance, on_report=reports.append))
        except KeyboardInterrupt:
            notify("what is finished is kept; run again with --resume to go on.")
            raise
    try:
        print_result("\n".join([result_text(plan, target), *map(verdict_text, reports)]))
    except OutputError as error:
        raise OutputError(f"{error} {printable(str(target))} is published and complete.") from error
    return target


def _show_plan(plan: Any, tensors: str | None = None, output: str | None = None, workers: int | None = None) -> None:
    from bam_merge.publishing.destination import target_path
    from bam_merge.showing.plan import plan_text
    from bam_merge.values.threads import default_workers

    print_result(plan_text(plan, target_path(plan, output), workers or default_workers(), tensors))
    _check_place(plan, output)


def _check_place(plan: Any, output: str | None) -> None:
    from bam_merge.publishing.destination import misplaced, space_problem, target_path

    target = target_path(plan, output)
    if problems := misplaced(plan, target) or list(filter(None, [space_problem(plan, target)])):
        raise OutputError(*problems)


def main() -> None:
    """Entry point of the console script: runs the command, prints errors, exits with the status of the module's docstring."""
    complete_streams()
    escape_what_streams_lack()
    stop_on_signals()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BamMergeError as error:
        for problem in error.problems:
            fail(problem)
        failed = isinstance(error, VerificationFailed)
        if len(error.problems) > 1 and not failed:
            reading = sys.argv[1:2] in (["inspect"], ["diff"], ["verify"])
            tell(f"{len(error.problems)} problems{'' if reading else '; nothing was written'}.")
        sys.exit(1 if failed else 3 if isinstance(error, DurabilityUncertain) else 2)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        tell(f"bam-merge: {'stopped' if isinstance(cause, Stopped) else 'interrupted'}.")
        sys.exit(128 + (cause.args[0] if isinstance(cause, Stopped) else signal.SIGINT))
    except OSError as error:
        fail(str(error))
        sys.exit(2)
    except Exception as error:
        if not lack_of_memory(error):
            raise
        fail(
            f"not enough memory ({str(error).splitlines()[0] if str(error) else 'an allocation failed'}). bam-merge plan says how much "
            "a merge takes; --workers 1 takes the least, and --resume goes on with what is finished."
        )
        sys.exit(2)
