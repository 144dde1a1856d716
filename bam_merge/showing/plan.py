"""How plans, results and progress look. Builds text; cli.py prints it."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bam_merge.address import is_address
from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.expressions import Calibrated
from bam_merge.hub_id import hub_id
from bam_merge.planning.parts import Part
from bam_merge.planning.plan import Plan, Served, Step
from bam_merge.process import progress_console
from bam_merge.text import count, duration, human_bytes, listed, printable, ranges


def plan_text(plan: Plan, target: Path, workers: int, tensors: str | None = None) -> str:
    """The plan for people: tensors (all those matching the glob, or folded over layers), then sizes and needs."""
    lines = _aligned(_all_rows(plan, tensors) if tensors is not None else _folded_rows(plan))
    if tensors is not None and not lines:
        lines = [f"no tensor matches {tensors!r}"]
    free = shutil.disk_usage(next(place for place in (*target.parents, target) if place.exists())).free
    recipe = plan.recipe
    facts = {
        "method": f"{recipe.method}, layout {plan.layout.name}",
        "experts": recipe.experts_shown if recipe.method != "merge" else "",
        "sources": f"{len(plan.models)} x {plan.models[recipe.seed_name].family.name}",
        "layers": ", ".join(f"{item.layers} of {item.from_}" for item in recipe.output.layers or ()),
        "adapters": ", ".join(_adapted(name, len(model.adapters)) for name, model in plan.models.items() if model.adapters),
        "tokenizer": _tokenizer(plan),
        "parameters": f"{plan.parameters:,} total, {plan.active_parameters:,} active per token",
        "read, write": f"{human_bytes(plan.bytes_read)}, {human_bytes(plan.bytes_written)} in {count(len(plan.shards), 'file')}",
        "peak memory": f"about {human_bytes(plan.peak_memory(workers))} with {count(workers, 'worker')}",
        "routers": _calibrated(plan),
        "output": f"{printable(str(target), 1000)} ({human_bytes(free)} free)",
    }
    lines += ["", *(f"{name:12} {value}" for name, value in facts.items() if value), *_tokens(plan)]
    lines += [f"{'hub':12} {source}: {printable(text)}" for source, text in _from_hub(plan)]
    lines += [f"{'elsewhere':12} {text}" for text in _elsewhere(plan)]
    for source, reasons in plan.unused.items():
        for reason, names in _grouped(reasons).items():
            first = f"{names[0]}{', ...' if len(names) > 1 else ''}"
            lines.append(f"{'not read':12} {source}: {count(len(names), 'tensor')}{_size(plan, source, names)} ({first}): {reason}")
    lines += _served(plan)
    lines += [f"{'accepted':12} {warning}" for warning in plan.accepted]
    lines += [f"{'note':12} {note}" for note in (*_notes(plan), *_folders_like_models(plan))]
    return "\n".join(lines)


def _notes(plan: Plan) -> Iterator[str]:
    """The plan's notes, but for those that say why an engine cannot serve the result: that stands above them."""
    told = {f"output.layout: {plan.layout.name}: {reason}" for item in plan.serves for reason in item.reasons}
    yield from (note for note in plan.notes if note not in told)


def _served(plan: Plan) -> Iterator[str]:
    """In which engines the result can be served, and why it cannot in the others."""
    yield f"{'serves in':12} {', '.join(_trial(item) for item in plan.serves if item.serves)}"
    for item in plan.serves:
        yield from (f"{'not in':12} {item.shown}: {reason}" for reason in item.reasons)


def _trial(item: Served) -> str:
    """An engine, and how it is known what it does; transformers is held against every merge by its proof."""
    return item.shown if item.word == "transformers" else f"{item.shown} ({item.how})"


def _from_hub(plan: Plan) -> Iterator[tuple[str, str]]:
    """Which models of the hub the sources are, at which commit, and what is yet to be downloaded of each."""
    for name, store in plan.recipe.stores.items():
        if (known := plan.recipe.known.get(store.path)) is not None:
            remote = plan.remotes.get(name)
            if is_address(known.recorded):
                continue
            what = f"{human_bytes(remote.missing)} of {human_bytes(remote.nbytes)} to download" if remote else "in the cache"
            yield name, f"{known.recorded}, {what}"


def _elsewhere(plan: Plan) -> Iterator[str]:
    """Which sources are folders elsewhere, whose weights are read there."""
    for name, place in plan.elsewhere.items():
        yield f"{name}: {printable(place['address'])}, {human_bytes(place['bytes'])}, of which a merge reads ranges"


def _folders_like_models(plan: Plan) -> Iterator[str]:
    """A note on folders whose names could be those of models of the hub: the folders count."""
    places = {name: store.path for name, store in plan.recipe.stores.items() if not store.adapter}
    if names := [name for name, text in places.items() if text not in plan.recipe.known and hub_id(text) is not None]:
        are = "is a folder" if len(names) == 1 else "are folders"
        yield f"{listed([f'sources.{name}' for name in names])} {are}; a model of the hub would be hf://{printable(places[names[0]])}."


def _adapted(name: str, adapters: int) -> str:
    return name if adapters == 1 else f"{name} ({adapters})"


def _tokenizer(plan: Plan) -> str:
    """Whose tokenizer the output gets; a plan's notes say more where the sources differ."""
    given = next((source for name, source in plan.files.items() if name in VOCABULARIES), None)
    if plan.alignment is None:
        return f"of {given}" if given else "none: no source has one, so their ids could not be compared"
    found = plan.alignment
    added = f" and {count(len(found.added), 'token')} of others" if found.added else ""
    return f"of {given}{added}: {count(len(found.ids), 'token')}, {found.shared:,} in all sources; {count(found.rows, 'row')}"


def _calibrated(plan: Plan) -> str:
    """What the pass over the texts takes that routers are made of."""
    found = plan.calibration
    if found is None:
        return ""
    return f"from {found.tokens:,} tokens of text: {found.flops / 1e12:.3g} Tflop, about {duration(found.seconds)} on these processors"


def _tokens(plan: Plan) -> Iterator[str]:
    """What each source gives to one vocabulary."""
    if plan.alignment is not None:
        for name, mine in plan.alignment.sources.items():
            counts = {"moved": mine.moved, "left out": len(mine.lost), "made": mine.made}
            parts = [f"{number:,} {what}" for what, number in counts.items() if number]
            yield f"{'tokens':12} {name}: {', '.join([f'{mine.tokens:,}', *parts])}"


def parts_text(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each part of a plan, as `planning.parts.parts_document` has them."""
    for part in parts:
        files = part["files"]
        names = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        read, written = human_bytes(part["bytes_read"]), human_bytes(part["bytes"])
        yield f"{'part' if part is parts[0] else '':12} {part['part']}/{len(parts)}: {read} read, {written} written: {names}"


def part_text(part: Part, tensors: int, at_once: bool, proved: bool, finish: str) -> str:
    """The line that a finished part prints, with what is to be done when all are. `at_once`: it was there already."""
    made = f"{count(tensors, 'tensor')}, {human_bytes(part.nbytes)} in {count(len(part.files), 'file')}{', verified' if proved else ''}"
    return f"part {part}{' was finished already' if at_once else ''}: {made}. When all parts are made: {finish}"


def result_text(plan: Plan, target: Path) -> str:
    """The line that a finished merge prints."""
    return (
        f"{printable(str(target), 1000)}: {plan.parameters:,} parameters ({plan.active_parameters:,} active per token), "
        f"{count(len(plan.steps), 'tensor')}, {human_bytes(plan.bytes_written)} in {count(len(plan.shards), 'file')}"
    )


def _size(plan: Plan, source: str, names: list[str]) -> str:
    """How many bytes stand beside the text model of a wrapper: they may be a good part of a download."""
    model = next((model for model in plan.models.values() if model.store_name == source), None)
    beside = [model.checkpoint.tensors[name].nbytes for name in names if name in model.naming.beside] if model is not None else []
    return f", {human_bytes(sum(beside))}" if beside else ""


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups


def _row(step: Step, name: str, expression: str) -> tuple[str, str, str]:
    return name, f"{step.dtype.lower()} [{', '.join(map(str, step.shape))}]", expression


def _all_rows(plan: Plan, pattern: str | None) -> list[tuple[str, str, str]]:
    return [_row(step, step.name, step.expression) for step in plan.steps if pattern is None or fnmatchcase(step.name, pattern)]


def _folded_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """One row for all layers, and all experts, in which a tensor is made the same way: layers.{0-29}, {seed,code}:NAME."""
    over_layers: dict[tuple[Any, ...], list[Step]] = {}
    for step in plan.steps:
        key = (_without_layer(step.name, step.layer), _without_layer(step.expression, step.layer), step.expert, step.dtype, step.shape)
        over_layers.setdefault(key, []).append(step)
    over_experts: dict[tuple[Any, ...], list[tuple[Step, str]]] = {}
    for (name, expression, expert, _, _), steps in over_layers.items():
        layers = ranges([step.layer for step in steps if step.layer is not None])
        if len(steps) == 1:
            expression = expression.replace("{layer}", layers)
        source, colon, tensor = expression.partition(":")
        name = name.replace("{layer}", layers)
        if expert is not None and colon:
            name, expression = name.replace(f"experts.{expert}.", "experts.{expert}."), tensor
        over_experts.setdefault((name, expression, expert is not None and colon), []).append((steps[0], source))
    rows = []
    for (name, expression, folded), members in over_experts.items():
        if folded:
            name = name.replace("{expert}", ranges([step.expert for step, _ in members if step.expert is not None]))
            sources = [source for _, source in members]
            alike = "(" in sources[0] and len(set(sources)) == 1
            expression = f"{{{','.join(sources)}}}:{expression}" if len(members) > 1 and not alike else f"{sources[0]}:{expression}"
        rows.append(_row(members[0][0], name, expression))
    return rows


def _without_layer(text: str, layer: int | None) -> str:
    return text if layer is None else re.sub(rf"\.{layer}\.", ".{layer}.", text, count=text.count(":") + 1)


def _aligned(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"{name:{widths[0]}}  {kind:{widths[1]}}  {expression}".rstrip() for name, kind, expression in rows]


@contextmanager
def merge_progress(plan: Plan) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with bytes per second and time left, until all is written; silent where stderr is not a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = progress_console()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("merging", total=sum(step.nbytes for step in plan.steps if not isinstance(step.expr, Calibrated)))

        def advance(count: int) -> None:
            progress.advance(task, count)
            if progress.finished:  # the proof that follows has a bar of its own
                progress.stop()

        yield advance
