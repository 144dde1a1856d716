"""The command line. It prints through process.py: results to stdout, messages and progress to stderr.

Exit status: 0 all well, 1 the answer is no (diff: different; verify: a check failed), 2 a usage, recipe or checkpoint error,
3 published, but not known to survive a power cut, 128 + N ended by signal N (130 Ctrl-C, 143 SIGTERM).
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from bam_merge import __version__
from bam_merge.arguments import DefaultMerge, Tolerance, UserPath
from bam_merge.errors import OutputError
from bam_merge.process import (
    PROBLEM_LENGTH,
    one_blas_thread,
    print_result,
    result_width,
    results_in_colour,
    results_in_unicode,
    run_command,
    tell,
)
from bam_merge.text import printable

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help starts at once
    from bam_merge.comparing.drift import Drift
    from bam_merge.comparing.two_models import Comparison
    from bam_merge.planning.plan import Plan
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.showing.terminal import Terminal
    from bam_merge.verifying.report import Report


LEVELS = ("quick", "full", "none")
"""How deep a proof looks."""


@click.group(cls=DefaultMerge, context_settings={"help_option_names": ["-h", "--help"]})
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
@click.argument("recipe", type=UserPath())
@click.option("--output", type=UserPath(), metavar="DIR", help="Write here instead of the recipe's output.path.")
@click.option("--force", is_flag=True, help="Replace an existing output folder that holds a saved model and nothing else.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, if there is one; nothing to do if it had finished.")
@click.option(
    "--verify", type=click.Choice(LEVELS), default="quick", help="How deep to prove the result before it appears. Default: quick."
)
@click.option("--no-verify", is_flag=True, help="The same as --verify none.")
@click.option("--device", default="cpu", metavar="NAME", help="What the proof computes on: cpu, cuda, cuda:1, mps. Default: cpu.")
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Worker threads. Default: one per processor, at most 8.")
@click.option("--dry-run", is_flag=True, help="Only show the plan, as bam-merge plan does.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity where a merge gives them, and record it in the manifest.")
def merge(
    recipe: str,
    output: str | None,
    force: bool,
    resume: bool,
    verify: Literal["quick", "full", "none"],
    no_verify: bool,
    device: str,
    workers: int | None,
    dry_run: bool,
    allow_nonfinite: bool,
) -> None:
    """Carry out RECIPE and publish the merged checkpoint."""
    from bam_merge.planning.make import plan_file
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.values.threads import default_workers

    plan, workers = plan_file(recipe), workers or default_workers()
    if dry_run:
        _show_plan(plan, workers, output=output)
        return
    for note in (*(f"accepted: {warning}" for warning in plan.accepted), *plan.notes):
        tell(f"bam-merge: {note}")
    _execute(plan, output, MergeOptions(force, resume, workers, allow_nonfinite, "none" if no_verify else verify, device))


@cli.command()
@click.argument("recipe", type=UserPath())
@click.option("--tensors", metavar="GLOB", help="List every tensor whose name matches, layer by layer.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def plan(recipe: str, tensors: str | None, as_json: bool) -> None:
    """Show what RECIPE would make from what, its sizes, and the memory and disk it needs. Reads headers only."""
    from bam_merge.planning.make import plan_file
    from bam_merge.values.threads import default_workers

    plan = plan_file(recipe)
    if as_json:
        print_result(json.dumps(plan.document(default_workers()), indent=2))
        _check_place(plan, None)
    else:
        _show_plan(plan, default_workers(), tensors)


@cli.command()
@click.argument("path", type=UserPath())
@click.option("--tensors", metavar="GLOB", help="Only the tensors whose name matches, each with how it was made.")
@click.option("--layer", type=click.IntRange(0), metavar="N", help="Only the tensors of this layer.")
@click.option("--where", metavar="SOURCE:GLOB", help="What became of these tensors of a merge's source, as in 'math:model.layers.7.*'.")
@click.option("--all", "every", is_flag=True, help="List every tensor, without folding equal layers and experts.")
@click.option("--stats", is_flag=True, help="Read the values: range, moments, oddities, duplicates, routers.")
@click.option("--as-bam", type=click.IntRange(1), metavar="N", help="What the mixtures of N such dense models would cost.")
@click.option("--top-k", type=click.IntRange(1), default=1, metavar="K", help="FFN experts per token, for --as-bam. Default: 1.")
@click.option("--context", type=click.IntRange(1), default=256, metavar="N", help="Tokens of the prompt that FLOPs are for. Default: 256.")
@click.option("--json", "as_json", is_flag=True, help="Print the inspection as one JSON document.")
def inspect(
    path: str,
    tensors: str | None,
    layer: int | None,
    where: str | None,
    every: bool,
    stats: bool,
    as_bam: int | None,
    top_k: int,
    context: int,
    as_json: bool,
) -> None:
    """Show what the model in PATH, a folder or a safetensors file, is, holds and costs. Reads headers only, unless --stats."""
    from bam_merge.inspecting.inspection import inspect as look

    one_blas_thread()
    gc.disable()  # it would walk the records of 100,000 tensors again and again, and there is nothing to free
    try:
        found = look(path, tensors=tensors, layer=layer, where=where, stats=stats, as_bam=as_bam, top_k=top_k, context=context)
    finally:
        gc.enable()
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
        return
    from bam_merge.showing.inspection import inspection_text

    print_result(inspection_text(found, _terminal(), every, zoomed=tensors is not None or layer is not None))


@cli.command()
@click.argument("models", type=UserPath(), nargs=-1, required=True, metavar="A B | E1 E2 ...")
@click.option(
    "--seed", type=UserPath(), metavar="S", help="Compare the branches E1 E2 ... with the seed S that they came from, and with each other."
)
@click.option("--tol", type=Tolerance(), default=0.0, metavar="X", help="Tensors whose relative difference is at most X are the same.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only the tensors whose name or role matches; may be repeated.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out the tensors whose name or role matches; may be repeated.")
@click.option("--all", "every", is_flag=True, help="List every tensor that differs, and every one that was left out.")
@click.option("--html", type=UserPath(dir_okay=False), metavar="FILE", help="Write the report as one page that needs no network.")
@click.option("--force", is_flag=True, help="Replace an existing FILE of --html.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def diff(
    models: tuple[str, ...],
    seed: str | None,
    tol: float,
    only: tuple[str, ...],
    ignore: tuple[str, ...],
    every: bool,
    html: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare two models, or branches with their seed. A model is a folder, a safetensors file, or FOLDER#EXPERT of a mixture.

    Exit status: 0 the same, 1 different, 2 could not be compared.
    """
    if html is not None:
        from bam_merge.showing.page import check_free, write_page

        check_free(Path(html), force)
    found, text = _compared(models, seed, tol, only, ignore)
    if html is not None:
        write_page(found, Path(html), force)
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
    else:
        print_result(text(_terminal(), every))
    if not found.equal:
        sys.exit(1)


def _compared(
    models: tuple[str, ...], seed: str | None, tol: float, only: tuple[str, ...], ignore: tuple[str, ...]
) -> "tuple[Comparison | Drift, Callable[[Terminal, bool], str]]":
    """The comparison or the drift, and what gives its text for a terminal, all of it or what matters."""
    one_blas_thread()
    if seed is None:
        if len(models) != 2:
            raise click.UsageError(f"{len(models)} model(s) given: two are compared, or branches with their seed after --seed S.")
        from bam_merge.comparing.two_models import diff as compare
        from bam_merge.showing.comparison import comparison_text

        compared = compare(*models, tol=tol, only=only, ignore=ignore)
        return compared, partial(comparison_text, compared)
    if given := [name for name, value in (("--tol", tol), ("--only", only), ("--ignore", ignore)) if value]:
        raise click.UsageError(f"{', '.join(given)}: not together with --seed.")
    from bam_merge.comparing.branches import drift
    from bam_merge.showing.drift import drift_text

    drifted = drift(seed, models)
    return drifted, partial(drift_text, drifted)


@cli.command()
@click.argument("folder", type=UserPath())
@click.option("--recipe", type=UserPath(), metavar="RECIPE", help="The recipe, when the sources are not found from the manifest.")
@click.option("--text", "texts", type=UserPath(), multiple=True, metavar="FILE", help="Measure perplexity on this text; may be repeated.")
@click.option("--verify", "level", type=click.Choice(LEVELS[:2]), default="quick", help="How deep to look. Default: quick.")
@click.option("--device", default="cpu", metavar="NAME", help="What is computed on: cpu, cuda, cuda:1, mps. Default: cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@click.argument("more_texts", type=UserPath(), nargs=-1, metavar="[FILE ...]")
def verify(
    folder: str, recipe: str | None, texts: tuple[str, ...], more_texts: tuple[str, ...], level: str, device: str, as_json: bool
) -> None:
    """Check the merged FOLDER: its files, its bytes against the sources, and what it computes.

    After --text FILE, further FILEs may follow.
    """
    from bam_merge.planning.make import plan_file
    from bam_merge.showing.verification import report_tables, verify_progress
    from bam_merge.verifying.options import VerifyOptions
    from bam_merge.verifying.verification import verify as run

    if more_texts and not texts:
        raise click.UsageError(f"unexpected {more_texts[0]!r}; texts for perplexity come after --text.")
    with verify_progress() as progress:
        options = VerifyOptions(level, device, progress=progress)
        report = run(folder, plan_file(recipe) if recipe else None, (*texts, *more_texts), options)
    if as_json:
        print_result(json.dumps(report.document(), indent=2, allow_nan=False))
    else:
        print_result(_terminal().text(*report_tables(report)))
    if not report.ok:
        sys.exit(1)


@cli.command()
@click.argument("folder", type=UserPath())
@click.argument("output", type=UserPath())
@click.option("--force", is_flag=True, help="Replace an existing OUTPUT folder that holds a saved model and nothing else.")
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="The most bytes of tensors in one file.")
def convert(folder: str, output: str, force: bool, max_shard_size: str) -> None:
    """Write the pickled weights (.bin, .pt, .pth) of FOLDER as safetensors into OUTPUT, with config.json and the tokenizer's files.

    No code of the files is run: torch's weights_only loader reads them, in a process without network that has a limit of memory and time.
    """
    from bam_merge.converting.convert import convert as run
    from bam_merge.converting.convert import summary

    result = run(folder, output, force, tell_note, max_shard_size=max_shard_size)
    for note in result.notes:
        tell_note(f"{note}.")
    print_result(summary(result))


@cli.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from bam_merge.recipe.schema import schema as recipe_schema

    print_result(json.dumps(recipe_schema(), indent=2))


@cli.command()
@click.argument("folder", type=UserPath(file_okay=False), default="demo")
@click.option("--force", is_flag=True, help="Replace an earlier demo in FOLDER.")
def demo(folder: str, force: bool) -> None:
    """Make four small dense checkpoints in FOLDER, merge them into a BAM mixture, prove it, run it. Offline, a few seconds."""
    from bam_merge.demo.demo import DEMO_TOKENS, continuation, make_demo
    from bam_merge.planning.make import plan_file
    from bam_merge.publishing.options import MergeOptions

    recipe = make_demo(Path(folder), force)
    tell(f"Four small dense Llama checkpoints and the recipe are in {printable(folder)}.\n")
    plan = plan_file(recipe)
    options = MergeOptions(force=True)
    _show_plan(plan, options.workers)
    target = _execute(plan, None, options)
    ids = [1, 2, 3, 5, 8]
    command = f"python -m bam_merge.model {printable(str(target), 1000)} --ids '{' '.join(map(str, ids))}' --tokens {DEMO_TOKENS}"
    print_result(f"\nIts weights are random, so what it says is too. The reference model, as from {command}:")
    print_result(" ".join(map(str, continuation(target, ids, DEMO_TOKENS))))


def _terminal() -> "Terminal":
    """What stdout can show: 80 columns, no colour and no escape where it is no terminal."""
    from bam_merge.showing.terminal import Terminal

    return Terminal(result_width(), results_in_colour(), results_in_unicode())


def tell_note(text: str) -> None:
    """A remark of what a command does, on stderr."""
    tell(f"bam-merge: {printable(text, PROBLEM_LENGTH)}")


def _execute(plan: "Plan", output: str | None, options: "MergeOptions") -> Path:
    """Merge with a progress bar, and print what came of it."""
    from bam_merge.publishing.publish import publish
    from bam_merge.showing.plan import merge_progress, result_text
    from bam_merge.showing.verification import verdict_text, verify_progress

    reports: list[Report] = []

    with merge_progress(plan) as advance, verify_progress() as verified:
        watched = replace(options, notify=tell_note, progress=advance, on_report=reports.append, on_verify=verified)
        try:
            target = publish(plan, output, watched)
        except KeyboardInterrupt:
            tell_note("what is finished is kept; run again with --resume to go on.")
            raise
    try:
        print_result("\n".join([result_text(plan, target), *map(verdict_text, reports)]))
    except OutputError as error:
        raise OutputError(f"{error} {printable(str(target))} is published and complete.") from error
    return target


def _show_plan(plan: "Plan", workers: int, tensors: str | None = None, output: str | None = None) -> None:
    from bam_merge.publishing.destination import target_path
    from bam_merge.showing.plan import plan_text

    print_result(plan_text(plan, target_path(plan, output), workers, tensors))
    _check_place(plan, output)


def _check_place(plan: "Plan", output: str | None) -> None:
    from bam_merge.publishing.destination import misplaced, space_problem, target_path

    target = target_path(plan, output)
    if problems := misplaced(plan, target) or list(filter(None, [space_problem(plan, target)])):
        raise OutputError(*problems)


def main() -> None:
    """Entry point of the console script: runs the command, prints errors, exits with the status of the module's docstring."""
    run_command(cli, reads_only=sys.argv[1:2] in (["inspect"], ["diff"], ["verify"]))
