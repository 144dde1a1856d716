"""The command line. It prints through process.py: results to stdout, messages and progress to stderr.

Exit status: 0 all well, 1 the answer is no (diff: different; verify: a check failed), 2 a usage, recipe or checkpoint error,
3 published, but not known to survive a power cut, 4 not yet: another process makes that part, or parts are missing,
128 + N ended by signal N (130 Ctrl-C, 143 SIGTERM).
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from bam_merge import __version__
from bam_merge.arguments import DefaultMerge, PartOf, PathHere, UserPath, check_division, ranges_option
from bam_merge.commands import LEVELS, calibrate, convert, diff, downloads, inspect, route, routers_told, tell_note, verify
from bam_merge.errors import OutputError
from bam_merge.process import print_result, run_command, tell
from bam_merge.serving_commands import chat, export, push, refresh
from bam_merge.text import printable

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help starts at once
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from bam_merge.planning.plan import Plan
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.verifying.report import Report


@click.group(cls=DefaultMerge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bam-merge")
def cli() -> None:
    """Build mixture-of-experts checkpoints (BAM, BTX, Sparse Upcycling) out of dense ones.

    \b
    bam-merge RECIPE.yaml           plan, merge and publish, the same as bam-merge merge RECIPE.yaml
    bam-merge plan RECIPE.yaml      show what would be made from what
    bam-merge finish RECIPE.yaml    publish what --part made, on one machine or several
    bam-merge inspect PATH          show what a model is, holds and costs
    bam-merge diff A B              compare two models, or branches with their seed
    bam-merge route OUT             show which expert takes which token of a text
    bam-merge extract OUT#experts.NAME FOLDER
                                    write one expert as the dense model that it is
    """


for command in (inspect, diff, route, verify, calibrate, convert, push, refresh, chat, export):
    cli.add_command(command)


def merge_options(command: "Callable[..., None]") -> "Callable[..., None]":
    """The options that merge and finish share."""
    options = (
        click.option("--output", type=PathHere(), metavar="DIR", help="Write here instead of the recipe's output.path."),
        click.option("--force", is_flag=True, help="Replace an existing output folder that holds a saved model and nothing else."),
        click.option(
            "--verify", type=click.Choice(LEVELS), default="quick", help="How deep to prove the result before it appears. Default: quick."
        ),
        click.option("--no-verify", is_flag=True, help="The same as --verify none."),
        click.option(
            "--device", default="cpu", metavar="NAME", help="What proof and texts compute on: cpu, cuda, cuda:1, mps. Default: cpu."
        ),
        click.option(
            "--workers", type=click.IntRange(1, 64), metavar="N", help="Worker threads. Default: one per processor, at most 8."
        ),
        ranges_option,
        click.option(
            "--allow-nonfinite", is_flag=True, help="Write NaN and infinity where a merge gives them, and record it in the manifest."
        ),
        click.option(
            "--progress", type=click.Choice(("bar", "json")), default="bar",
            help="How far it has come, on stderr: a bar in a terminal, or a line of JSON a second. Default: bar.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("recipe", type=UserPath())
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, if there is one; nothing to do if it had finished.")
@click.option("--dry-run", is_flag=True, help="Only show the plan, as bam-merge plan does.")
@click.option(
    "--part", type=PartOf(), metavar="I/N", help="Make part I of N only, of whole files, or go on with it. bam-merge finish publishes them."
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Make the parts as tasks of the Ray cluster at ADDRESS, or of one of this machine, then finish. After RECIPE.",
)
@click.option("--parts", type=click.IntRange(1), metavar="N", help="How many parts --ray makes. Default: by the cluster.")
@merge_options
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
    ranges: bool,
    allow_nonfinite: bool,
    progress: Literal["bar", "json"],
    part: tuple[int, int] | None,
    ray: str | None,
    parts: int | None,
) -> None:
    """Carry out RECIPE and publish the merged checkpoint."""
    from bam_merge.planning.make import make_plan
    from bam_merge.publishing.earlier import as_before
    from bam_merge.recipe.load import load_recipe
    from bam_merge.values.threads import default_workers

    check_division(part, ray, parts)
    goes_on = resume or part is not None or ray is not None
    with downloads():
        wanted = load_recipe(recipe)
        plan = make_plan(as_before(wanted, output, tell_note) if goes_on and not dry_run else wanted)
    if dry_run:
        _show_plan(plan, workers or default_workers(), output=output, parts=_divided(plan, part[1] if part else parts))
        return
    _tell_notes(plan)
    options = _options(force, resume, workers, allow_nonfinite, "none" if no_verify else verify, device, ranges)
    if ray is not None:
        from bam_merge.publishing.on_ray import OnRay, merge_on_ray

        where = OnRay(ray or None, parts, workers)
        _execute(plan, output, options, progress, partial(merge_on_ray, where=where))
    elif part is not None:
        _execute_part(plan, output, part, options, progress)
    else:
        _execute(plan, output, options, progress)


@cli.command()
@click.argument("recipe", type=UserPath())
@merge_options
def finish(
    recipe: str,
    output: str | None,
    force: bool,
    verify: Literal["quick", "full", "none"],
    no_verify: bool,
    device: str,
    workers: int | None,
    ranges: bool,
    allow_nonfinite: bool,
    progress: Literal["bar", "json"],
) -> None:
    """Publish the merged checkpoint of RECIPE, whose parts were all made by --part: index, card, manifest, proof, one rename."""
    from bam_merge.planning.make import make_plan
    from bam_merge.publishing.earlier import as_before
    from bam_merge.publishing.finishing import finish as run
    from bam_merge.recipe.load import load_recipe

    with downloads():
        plan = make_plan(as_before(load_recipe(recipe), output, tell_note))
    _tell_notes(plan)
    options = _options(force, False, workers, allow_nonfinite, "none" if no_verify else verify, device, ranges)
    _execute(plan, output, options, progress, run)


def _options(
    force: bool,
    resume: bool,
    workers: int | None,
    allow_nonfinite: bool,
    verify: Literal["quick", "full", "none"],
    device: str,
    ranges: bool,
) -> "MergeOptions":
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.values.threads import default_workers

    return MergeOptions(force, resume, workers or default_workers(), allow_nonfinite, verify, device, ranges=ranges)


def _tell_notes(plan: "Plan") -> None:
    for note in (*(f"accepted: {warning}" for warning in plan.accepted), *plan.notes):
        tell(f"bam-merge: {note}")


@cli.command()
@click.argument("recipe", type=UserPath())
@click.option("--tensors", metavar="GLOB", help="List every tensor whose name matches, layer by layer.")
@click.option("--parts", type=click.IntRange(1), metavar="N", help="Also list the N parts that as many processes would make, by --part.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
def plan(recipe: str, tensors: str | None, parts: int | None, as_json: bool) -> None:
    """Show what RECIPE would make from what, its sizes, and the memory and disk it needs. Reads headers only."""
    from bam_merge.planning.make import plan_file
    from bam_merge.values.threads import default_workers

    with downloads():
        plan = plan_file(recipe)
    divided = _divided(plan, parts)
    if as_json:
        print_result(json.dumps({**plan.document(default_workers()), **({"parts": divided} if divided else {})}, indent=2))
        _check_place(plan, None)
    else:
        _show_plan(plan, default_workers(), tensors, parts=divided)


@cli.command()
@click.argument("expert", type=UserPath(exists=False), metavar="OUT#experts.NAME")
@click.argument("folder", type=PathHere(exists=False))
@click.option("--family", metavar="NAME", help="The dense family, where the mixture does not say of which it was made.")
@click.option("--force", is_flag=True, help="Replace an existing FOLDER that holds a saved model and nothing else.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, if there is one; nothing to do if it had finished.")
@click.option("--verify", type=click.Choice(LEVELS), default="quick", help="How deep to prove the result. Default: quick.")
@click.option("--no-verify", is_flag=True, help="The same as --verify none.")
@click.option("--device", default="cpu", metavar="NAME", help="What the proof computes on: cpu, cuda, cuda:1, mps. Default: cpu.")
@ranges_option
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Worker threads. Default: one per processor, at most 8.")
def extract(
    expert: str,
    folder: str,
    family: str | None,
    force: bool,
    resume: bool,
    verify: Literal["quick", "full", "none"],
    no_verify: bool,
    device: str,
    ranges: bool,
    workers: int | None,
) -> None:
    """Write one expert of the mixture in OUT as the dense model that it was, or became, into FOLDER.

    NAME is the expert's name, or its number. Attention and FFN are the expert's, all else the mixture's; names and config.json are those of
    the dense family. It is a merge of one source, which a recipe can do too: sources: {math: OUT#experts.math}.
    """
    from bam_merge.planning.make import make_plan
    from bam_merge.publishing.extract import extraction

    with downloads():
        plan = make_plan(extraction(expert, folder, family))
    for note in plan.notes:
        tell_note(note)
    options = _options(force, resume, workers, False, "none" if no_verify else verify, device, ranges)
    _execute(plan, None, options)


@cli.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from bam_merge.recipe.schema import schema as recipe_schema

    print_result(json.dumps(recipe_schema(), indent=2))


@cli.command()
@click.argument("folder", type=PathHere(file_okay=False), default="demo")
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


def _execute(
    plan: "Plan", output: str | None, options: "MergeOptions", progress: str = "bar", run: "Callable[..., Path] | None" = None
) -> Path:
    """Merge, or `run` what takes the same, showing how far it has come, and print what came of it."""
    from bam_merge.publishing.publish import publish
    from bam_merge.showing.plan import result_text
    from bam_merge.showing.progress import shown
    from bam_merge.showing.verification import verdict_text

    reports: list[Report] = []

    plan = _downloaded(plan, output, options)
    with shown(plan, progress) as (advance, calibrated, verified):
        watched = replace(
            options, notify=tell_note, progress=advance, on_report=reports.append, on_verify=verified, on_calibrate=calibrated
        )
        try:
            target = (run or publish)(plan, output, watched)
        except KeyboardInterrupt:
            tell_note(f"what is finished is kept; run again{'' if run else ' with --resume'} to go on.")
            raise
    try:
        print_result("\n".join([result_text(plan, target), *map(verdict_text, reports), *routers_told(reports)]))
    except OutputError as error:
        raise OutputError(f"{error} {printable(str(target))} is published and complete.") from error
    return target


def _downloaded(plan: "Plan", output: str | None, options: "MergeOptions") -> "Plan":
    """The plan over folders, with what is to be said of them."""
    from bam_merge.publishing.fetching import fetched

    if plan.remotes:
        with downloads():
            said, plan = plan.notes, fetched(plan, output, replace(options, notify=tell_note))
        for note in plan.notes:
            if note not in said:
                tell_note(note)
    return plan


def _execute_part(plan: "Plan", output: str | None, part: tuple[int, int], options: "MergeOptions", progress: str) -> None:
    """Make one part, showing how far it has come, and print what is to be done when all are made."""
    from bam_merge.planning.parts import parts_of, plan_of
    from bam_merge.publishing.finishing import finish_command
    from bam_merge.publishing.parts import make_part
    from bam_merge.showing.plan import part_text
    from bam_merge.showing.progress import shown

    number, of = part
    mine = plan_of(plan, parts_of(plan, of)[number - 1])
    plan = _downloaded(plan, output, options)
    with shown(mine, progress, f"{number}/{of}") as (advance, _, verified):
        try:
            made = make_part(plan, output, number, of, replace(options, notify=tell_note, progress=advance, on_verify=verified))
        except KeyboardInterrupt:
            tell_note("what is finished is kept; run again to go on.")
            raise
    if made is not None:
        print_result(part_text(made.part, len(made.digests), made.at_once, made.proved, finish_command(plan, output)))


def _divided(plan: "Plan", parts: int | None) -> "list[dict[str, Any]]":
    from bam_merge.planning.parts import parts_document

    return parts_document(plan, parts) if parts is not None else []


def _show_plan(
    plan: "Plan", workers: int, tensors: str | None = None, output: str | None = None, parts: "Sequence[Mapping[str, Any]]" = ()
) -> None:
    from bam_merge.publishing.destination import target_path
    from bam_merge.showing.plan import parts_text, plan_text

    print_result("\n".join([plan_text(plan, target_path(plan, output), workers, tensors), *parts_text(parts)]))
    _check_place(plan, output)


def _check_place(plan: "Plan", output: str | None) -> None:
    from bam_merge.publishing.destination import misplaced, space_problem, target_path

    target = target_path(plan, output)
    if problems := misplaced(plan, target) or list(filter(None, [space_problem(plan, target)])):
        raise OutputError(*problems)


def main() -> None:
    """Entry point of the console script: runs the command, prints errors, exits with the status of the module's docstring."""
    run_command(cli, reads_only=sys.argv[1:2] in (["inspect"], ["diff"], ["route"], ["verify"], ["push"], ["chat"]))
