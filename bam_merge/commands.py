"""The commands about models that are there: inspect, diff, route, verify, convert; and what those of cli.py say and show as these do."""

import gc
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bam_merge.arguments import PathHere, Tolerance, UserPath, named_texts, ranges_option
from bam_merge.process import PROBLEM_LENGTH, one_blas_thread, print_result, result_width, results_in_colour, results_in_unicode, tell
from bam_merge.text import printable

if TYPE_CHECKING:  # a command imports what it needs when it runs, so that --help starts at once
    from contextlib import AbstractContextManager

    from bam_merge.comparing.drift import Drift
    from bam_merge.comparing.two_models import Comparison
    from bam_merge.showing.terminal import Terminal
    from bam_merge.verifying.report import Report


LEVELS = ("quick", "full", "none")
"""How deep a proof looks."""


@click.command()
@click.argument("path", type=UserPath())
@click.option("--tensors", metavar="GLOB", help="Only the tensors whose name matches, each with how it was made.")
@click.option("--layer", type=click.IntRange(0), metavar="N", help="Only the tensors of this layer.")
@click.option("--where", metavar="SOURCE:GLOB", help="What became of these tensors of a merge's source, as in 'math:model.layers.7.*'.")
@click.option("--all", "every", is_flag=True, help="List every tensor, without folding equal layers and experts.")
@click.option("--stats", is_flag=True, help="Read the values: range, moments, oddities, duplicates, routers.")
@click.option("--as-bam", type=click.IntRange(1), metavar="N", help="What the mixtures of N such dense models would cost.")
@click.option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="FFN experts per token, for --as-bam. Default: 1; 2 where a norm stands after the FFN.",
)
@click.option("--shards", type=click.IntRange(1), default=1, metavar="M", help="For --as-bam: every FFN is M experts. Default: 1.")
@click.option("--shared-expert", is_flag=True, help="For --as-bam: one more FFN, for every token.")
@click.option("--context", type=click.IntRange(1), default=256, metavar="N", help="Tokens of the prompt that FLOPs are for. Default: 256.")
@ranges_option
@click.option("--json", "as_json", is_flag=True, help="Print the inspection as one JSON document.")
def inspect(
    path: str,
    tensors: str | None,
    layer: int | None,
    where: str | None,
    every: bool,
    stats: bool,
    as_bam: int | None,
    top_k: int | None,
    shards: int,
    shared_expert: bool,
    context: int,
    ranges: bool,
    as_json: bool,
) -> None:
    """Show what the model in PATH, a folder or a safetensors file, is, holds and costs. Reads headers only, unless --stats."""
    from bam_merge.inspecting.inspection import inspect as look

    one_blas_thread()
    gc.disable()  # it would walk the records of 100,000 tensors again and again, and there is nothing to free
    try:
        with downloads():
            found = look(
                path, tensors=tensors, layer=layer, where=where, stats=stats, as_bam=as_bam, top_k=top_k, shards=shards,
                shared_expert=shared_expert, context=context, ranges=ranges,
            )  # fmt: skip
    finally:
        gc.enable()
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
        return
    from bam_merge.showing.inspection import inspection_text

    print_result(inspection_text(found, _terminal(), every, zoomed=tensors is not None or layer is not None))


@click.command()
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
@ranges_option
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
    ranges: bool,
    as_json: bool,
) -> None:
    """Compare two models, or branches with their seed. A model is a folder, a safetensors file, or FOLDER#EXPERT of a mixture.

    Exit status: 0 the same, 1 different, 2 could not be compared.
    """
    if html is not None:
        from bam_merge.showing.page import check_free, write_page

        check_free(Path(html), force)
    with downloads():
        found, text = _compared(models, seed, tol, only, ignore, ranges)
    if html is not None:
        write_page(found, Path(html), force)
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
    else:
        print_result(text(_terminal(), every))
    if not found.equal:
        sys.exit(1)


def _compared(
    models: tuple[str, ...], seed: str | None, tol: float, only: tuple[str, ...], ignore: tuple[str, ...], ranges: bool
) -> "tuple[Comparison | Drift, Callable[[Terminal, bool], str]]":
    """The comparison or the drift, and what gives its text for a terminal, all of it or what matters."""
    one_blas_thread()
    if seed is None:
        if len(models) != 2:
            raise click.UsageError(f"{len(models)} model(s) given: two are compared, or branches with their seed after --seed S.")
        from bam_merge.comparing.two_models import diff as compare
        from bam_merge.showing.comparison import comparison_text

        compared = compare(*models, tol=tol, only=only, ignore=ignore, ranges=ranges)
        return compared, partial(comparison_text, compared)
    if given := [name for name, value in (("--tol", tol), ("--only", only), ("--ignore", ignore)) if value]:
        raise click.UsageError(f"{', '.join(given)}: not together with --seed.")
    from bam_merge.comparing.branches import drift
    from bam_merge.showing.drift import drift_text

    drifted = drift(seed, models, ranges=ranges)
    return drifted, partial(drift_text, drifted)


@click.command()
@click.argument("folder", type=PathHere())
@click.option("--text", "texts", type=UserPath(), multiple=True, metavar="FILE", help="A text to look at; may be repeated.")
@click.option("--texts", "domains", multiple=True, metavar="NAME=FILE", help="A text that the expert NAME is for; may be repeated.")
@click.option("--layers", metavar="RANGE", help='Show the text for each of these layers, such as 3, "0,4-7" or "20-".')
@click.option("--tokens", type=click.IntRange(2), default=512, metavar="N", help="So many tokens of each text. Default: 512.")
@click.option("--device", default="cpu", metavar="NAME", help="What is computed on: cpu, cuda, cuda:1, mps. Default: cpu.")
@click.option("--html", type=UserPath(dir_okay=False), metavar="FILE", help="Write it as one page that needs no network.")
@click.option("--force", is_flag=True, help="Replace an existing FILE of --html.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON document.")
@click.argument("more_texts", type=UserPath(), nargs=-1, metavar="[FILE ...]")
def route(
    folder: str,
    texts: tuple[str, ...],
    domains: tuple[str, ...],
    more_texts: tuple[str, ...],
    layers: str | None,
    tokens: int,
    device: str,
    html: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show which expert of the mixture in FOLDER takes which token of a text, per router and layer.

    After --text FILE, further FILEs may follow. Any mixture will do that the reference model computes; its sources are not needed.
    """
    from bam_merge.routing.route import RouteOptions
    from bam_merge.routing.route import route as run
    from bam_merge.showing.routes import routes_text
    from bam_merge.showing.verification import verify_progress

    if more_texts and not texts:
        raise click.UsageError(f"unexpected {more_texts[0]!r}; texts come after --text.")
    if not texts and not domains:
        raise click.UsageError("no text: give one with --text FILE, or --texts NAME=FILE where the expert that it is for is known.")
    if html is not None:
        from bam_merge.showing.page import check_free

        check_free(Path(html), force)
    with downloads(), verify_progress("routing") as progress:
        found = run(folder, (*texts, *more_texts), named_texts(domains), RouteOptions(layers, tokens, device, progress=progress))
    if html is not None:
        from bam_merge.showing.routes_page import write_routes

        write_routes(found, Path(html), force)
    if as_json:
        print_result(json.dumps(found.document(), indent=2, allow_nan=False))
    else:
        print_result(routes_text(found, _terminal(), each_layer=layers is not None))


@click.command()
@click.argument("folder", type=UserPath())
@click.option("--recipe", type=UserPath(), metavar="RECIPE", help="The recipe, when the sources are not found from the manifest.")
@click.option("--text", "texts", type=UserPath(), multiple=True, metavar="FILE", help="Measure perplexity on this text; may be repeated.")
@click.option(
    "--texts",
    "domains",
    multiple=True,
    metavar="NAME=FILE",
    help="Also say what the routers do with this text, which the expert NAME is for; a file, folder or glob; may be repeated.",
)
@click.option("--verify", "level", type=click.Choice(LEVELS[:2]), default="quick", help="How deep to look. Default: quick.")
@click.option("--device", default="cpu", metavar="NAME", help="What is computed on: cpu, cuda, cuda:1, mps. Default: cpu.")
@ranges_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@click.argument("more_texts", type=UserPath(), nargs=-1, metavar="[FILE ...]")
def verify(
    folder: str,
    recipe: str | None,
    texts: tuple[str, ...],
    domains: tuple[str, ...],
    more_texts: tuple[str, ...],
    level: str,
    device: str,
    ranges: bool,
    as_json: bool,
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
    with downloads(), verify_progress() as progress:
        options = VerifyOptions(level, device, progress=progress, ranges=ranges)
        report = run(folder, plan_file(recipe) if recipe else None, (*texts, *more_texts), options, named_texts(domains))
    if as_json:
        print_result(json.dumps(report.document(), indent=2, allow_nan=False))
    else:
        terminal = _terminal()
        print_result(terminal.text(*report_tables(report, terminal)))
    if not report.ok:
        sys.exit(1)


@click.command()
@click.argument("folder", type=PathHere())
@click.argument("output", type=PathHere())
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


@click.command()
@click.argument("folder", type=PathHere())
@click.option("--texts", multiple=True, metavar="NAME=GLOB", help="An expert's text, a file, folder or glob; repeated.")
@click.argument("more_texts", nargs=-1, metavar="[NAME=GLOB]...")
@click.option("--output", type=PathHere(), metavar="DIR", help="Write here. Default: in the place of FOLDER.")
@click.option("--init", type=click.Choice(["ridge", "mean"]), default="ridge", help="The rule, as in a recipe. Default: ridge.")
@click.option("--tokens", type=click.IntRange(2), metavar="N", help="Tokens of each text. Default: 8192.")
@click.option("--scale", type=float, metavar="X", help="How sure the gates are. Default: 6; 180 for top-1 gates that are not renormalised.")
@click.option("--lambda", type=float, metavar="X", help="Of ridge. Default: 0.1.")
@click.option("--inputs", type=click.Choice(["seed", "mixture"]), help="Whose hidden states. Default: the seed's, where sources are there.")
@click.option("--force", is_flag=True, help="Replace an existing output folder that holds a saved model and nothing else.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed, if there is one.")
@click.option("--verify", "level", type=click.Choice(LEVELS), default="quick", help="How deep to prove the result. Default: quick.")
@click.option("--no-verify", is_flag=True, help="The same as --verify none.")
@click.option("--device", default="cpu", metavar="NAME", help="What to compute on: cpu, cuda, cuda:1, mps. Default: cpu.")
@click.option("--workers", type=click.IntRange(1, 64), metavar="N", help="Worker threads. Default: one per processor, at most 8.")
def calibrate(
    folder: str,
    texts: tuple[str, ...],
    more_texts: tuple[str, ...],
    output: str | None,
    level: Literal["quick", "full", "none"],
    no_verify: bool,
    workers: int | None,
    force: bool,
    resume: bool,
    device: str,
    **rule: Any,
) -> None:
    """Make the routers of the mixture in FOLDER anew, of a text for each expert, without merging again.

    FOLDER is of layout bam, mixtral, qwen2_moe or qwen3_moe. After --texts NAME=GLOB, further NAME=GLOB may follow.
    """
    from bam_merge.publishing.anew import calibrate as run
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.showing.verification import verdict_text, verify_progress
    from bam_merge.values.threads import default_workers

    if more_texts and not texts:
        raise click.UsageError(f"unexpected {more_texts[0]!r}; texts come after --texts.")
    named = named_texts((*texts, *more_texts))
    settings = {key: value for key, value in rule.items() if value is not None}
    reports: list[Report] = []
    with verify_progress("calibrating") as calibrated, verify_progress() as verified:
        options = MergeOptions(
            force, resume, workers or default_workers(), verify="none" if no_verify else level, device=device, notify=tell_note,
            on_report=reports.append, on_verify=verified, on_calibrate=calibrated,
        )  # fmt: skip
        target = run(folder, named, output, settings, options)
    print_result("\n".join([f"{printable(str(target), 1000)}: routers made anew", *map(verdict_text, reports), *routers_told(reports)]))


# ---- what commands say and show ------------------------------------------------------------


def downloads() -> "AbstractContextManager[None]":
    """Shows what is asked of the hub, and downloaded."""
    from bam_merge.showing.downloads import downloads_shown

    return downloads_shown(tell_note)


def routers_told(reports: "Sequence[Report]") -> list[str]:
    """What a merge's proofs say of routers that were tried on text, as tables."""
    from bam_merge.showing.verification import text_tables

    terminal = _terminal()
    return [terminal.text(*text_tables(report, terminal)) for report in reports if report.held_out is not None]


def _terminal() -> "Terminal":
    """What stdout can show: 80 columns, no colour and no escape where it is no terminal."""
    from bam_merge.showing.terminal import Terminal

    return Terminal(result_width(), results_in_colour(), results_in_unicode())


def tell_note(text: str) -> None:
    """A remark of what a command does, on stderr."""
    tell(f"bam-merge: {printable(text, PROBLEM_LENGTH)}")
