"""Routers of a mixture that is there, made anew of texts: a copy with other routers, proved and put in its place as a merge is."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from bam_merge.architectures.opening import open_folder
from bam_merge.calibrating.corpus import Calibration
from bam_merge.calibrating.stage import Made, State, Watch, WithRouters, make_routers
from bam_merge.checkpoints.folder import CONFIG
from bam_merge.checkpoints.format_1 import FORMAT_1
from bam_merge.checkpoints.header import FileIdentity, open_regular
from bam_merge.checkpoints.provenance import MANIFEST, sealed
from bam_merge.checkpoints.reading import changed_files
from bam_merge.errors import CheckpointError, OutputError, SyncFailed
from bam_merge.files import write_file, writing
from bam_merge.merging.outputs import write_all
from bam_merge.merging.planned_model import planned_model
from bam_merge.model.loading import StoredModel
from bam_merge.model.streaming import computing_on
from bam_merge.own_folder import open_file
from bam_merge.paths import located
from bam_merge.planning.card import with_routers_from_texts
from bam_merge.publishing.calibrated import accuracy_text, calibration_record
from bam_merge.publishing.destination import lack_of_space, occupied, overlap
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.mixtures import Mixture, Order, makes_routers, open_mixture, order_of, section_of
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import put_in_place, refuse
from bam_merge.publishing.replacing import contents, opened
from bam_merge.publishing.staging import Staging
from bam_merge.publishing.states import KeptStates
from bam_merge.system import sync
from bam_merge.text import printable, some
from bam_merge.values.tensors import encode
from bam_merge.verifying.calibrated import Asked, router_checks
from bam_merge.verifying.devices import open_device, torch_workers
from bam_merge.verifying.heldout import further_texts, tokens_made_of
from bam_merge.verifying.levels import LEVELS
from bam_merge.verifying.measuring import Way
from bam_merge.verifying.options import VerifyOptions, check_level
from bam_merge.verifying.report import Report
from bam_merge.verifying.tried import try_on_texts
from bam_merge.verifying.verification import verify

README = "README.md"


def calibrate(
    folder: str | os.PathLike[str],
    texts: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    options: MergeOptions | None = None,
) -> Path:
    """Make the routers of the mixture in `folder` anew, of a text for each expert, and publish the result at `output` (default: in the
    place of `folder`). Returns where it is.

    `texts` gives files, folders or globs by the expert's name (or index, where experts have no names); `settings` are further keys of a
    recipe's `router` section: init, prompts, negative_prompts, tokens, scale, lambda, inputs. Raises BamMergeError, leaving the target
    untouched.
    """
    options = options or MergeOptions()
    device = open_device(options.device)
    if options.level is not None:
        check_level(options.level)
    mixture = open_mixture(folder)
    target = Path(os.path.abspath(mixture.folder if output is None else located(output, error=OutputError)))
    in_place = os.path.realpath(target) == os.path.realpath(mixture.folder)
    _check_target(mixture, target, in_place, options)
    order = order_of(mixture, section_of(texts, settings or {}), target)
    for note in order.notes:
        options.notify(note)
    staging = Staging.open(target, options.notify)
    try:
        _make(mixture, order, staging, target, options, device)
        put_in_place(staging, target, options.force or in_place)
    except SyncFailed:
        staging.forget()
        raise
    finally:
        staging.close()
    return target


def _check_target(mixture: Mixture, target: Path, in_place: bool, options: MergeOptions) -> None:
    problems = occupied(target, options.force or in_place)
    source = mixture.folder.resolve()
    if not in_place and (how := overlap(target, source)):
        problems = [f"{printable(str(target))} {how} {printable(str(source))}, whose routers are made anew. Choose another folder."]
    nbytes = sum(header.identity.size for header in mixture.checkpoint.files.values())
    if not problems and (lack := lack_of_space(nbytes, target, "the copy takes")):
        problems = [lack]
    if problems:
        raise OutputError(*problems)


def _make(mixture: Mixture, order: Order, staging: Staging, target: Path, options: MergeOptions, device: Any) -> None:
    """Everything into the staging folder, synced, and proved."""
    kept = KeptStates(staging, order.fingerprint)
    before = kept.load() if options.resume else None
    staging.begin_afresh()
    if before is not None:  # another kill must not lose it
        kept.save(before, at_once=True)
    texts = _copied(mixture, staging, options.notify)
    watch = Watch(kept.save, lambda: before, options.on_calibrate)
    with computing_on(device, torch_workers(options.workers)) as computing, _models(mixture, order) as models:
        made = make_routers(order.wanted, models, computing, watch)
    kept.save(State(order.wanted[-1].inputs, 0, made, []), at_once=True)
    digests = _write(mixture, staging, made)
    calibration = Calibration(order.corpora)
    record = calibration_record(calibration, made)
    _write_texts(mixture, order, staging, texts, digests, record)
    if changed := [str(path) for path in changed_files(mixture.checkpoint)]:
        raise CheckpointError(f"{some(changed)} changed while it was copied. Run again when nothing writes to it.")
    sync_descriptor(staging.files, staging.output)
    options.notify(accuracy_text(calibration, made))
    if options.level is not None and staging.is_ours():
        _prove(mixture, order, staging, target, options, device, record)
    if not staging.is_ours():
        raise OutputError(f"{printable(str(staging.folder))} was deleted while it was written. Nothing was published; run again.")


def _copied(mixture: Mixture, staging: Staging, notify: Callable[[str], None]) -> dict[str, bytes]:
    """Copy the model's files as they are, but for manifest and card, which are returned."""
    with opened(mixture.folder) as descriptor:
        found = contents(descriptor)
    if found.foreign:
        notify(f"{some(found.foreign, 6)}: not what a saved model has, so not copied.")
    kept: dict[str, bytes] = {}
    for name in found.saved:
        if "/" in name:
            notify(f"{printable(name)}: not copied.")
            continue
        source = open_regular(str(mixture.folder / name))
        with os.fdopen(source, "rb") as stream:
            header = mixture.checkpoint.files.get(name)
            if header is not None and FileIdentity.of(os.fstat(source)) != header.identity:
                raise CheckpointError(f"{printable(str(mixture.folder / name))} changed since it was opened. Run again.")
            if name in (MANIFEST, README):
                kept[name] = stream.read()
                continue
            with writing(staging.output / name):
                copy = open_file(name, staging.files, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                with os.fdopen(copy, "wb") as written:
                    shutil.copyfileobj(stream, written, 2**20)
                    written.flush()
                    sync(copy)
    if CONFIG not in found.saved:
        raise CheckpointError(f"{printable(str(mixture.folder))}: its {CONFIG} is no file of a saved model.")
    return kept


@contextmanager
def _models(mixture: Mixture, order: Order) -> Iterator[Mapping[str, Callable[[Mapping[str, Made]], StoredModel]]]:
    """The models that the texts go through."""
    stored = mixture.stored
    by_parameter = {router.parameter: router for router in order.wanted}

    def own(made: Mapping[str, Made]) -> WithRouters:
        return WithRouters(stored.checkpoint, stored.config, stored.leaves, by_parameter, made)

    if order.plan is None:
        yield {"mixture": own}
        return
    with planned_model(order.plan, order.plan.recipe.seed_name) as seed:
        yield {"seed": lambda made: seed, "mixture": own}


def _write(mixture: Mixture, staging: Staging, made: Mapping[str, Made]) -> dict[str, str]:
    """The routers into the copied files; their digests."""
    digests = {}
    files = {mixture.checkpoint.tensors[name].file for name in made}
    for file in sorted(files):
        with writing(staging.output / file):
            output = open_file(file, staging.files, os.O_RDWR)
            try:
                for name, router in made.items():
                    entry = mixture.checkpoint.tensors[name]
                    if entry.file == file:
                        data = encode(router.values.flatten(), entry.dtype)
                        write_all(output, data, entry.offset)
                        digests[name] = xxhash.xxh3_128_hexdigest(data)
                with writing(staging.output / file, SyncFailed):
                    sync(output)
            finally:
                os.close(output)
    return digests


def _write_texts(
    mixture: Mixture, order: Order, staging: Staging, texts: Mapping[str, bytes], digests: Mapping[str, str], record: Mapping[str, Any]
) -> None:
    """Card and manifest, as they are true of the copy."""
    card = texts.get(README)
    if card is not None:
        with_recipe = order.recipe if mixture.manifest is not None else None
        card = with_routers_from_texts(card.decode(errors="surrogateescape"), with_recipe).encode(errors="surrogateescape")
        write_file(staging.output / README, card, staging.files)
    if mixture.manifest is None or order.recipe is None:
        return
    manifest = {key: value for key, value in mixture.manifest.items() if key not in ("calibration", "manifest_digest")}
    manifest["recipe"] = order.recipe.resolved()
    manifest["recipe_folder"] = _way_back(manifest["recipe"]["output"]["path"], order.recipe.folder)
    tensors = {name: dict(said) for name, said in manifest["tensors"].items()}
    for name, digest in digests.items():
        reads: dict[str, Any] = {} if manifest["format"] == FORMAT_1 else {"reads": []}
        tensors[name] = {**tensors[name], "expression": order.expressions[name], **reads, "digest": digest}
        tensors[name].pop("nonfinite", None)
    manifest["tensors"] = tensors
    manifest["unused"] = _renumbered(mixture.manifest)
    if card is not None:
        manifest["files"] = {**manifest["files"], README: xxhash.xxh3_128_hexdigest(card)}
    write_file(staging.output / MANIFEST, sealed({**manifest, "calibration": record}), staging.files)


def _renumbered(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Why tensors of the sources are not read, with the numbers that rules have without those of routers."""
    kept = [index for index, rule in enumerate(manifest["recipe"].get("rules", [])) if not makes_routers(rule)]
    names = {f"rules[{old}]": f"rules[{new}]" for new, old in enumerate(kept)}

    def renumbered(reason: Any) -> Any:
        label, space, rest = str(reason).partition(" ")
        return f"{names[label]}{space}{rest}" if label in names else reason

    return {name: {tensor: renumbered(why) for tensor, why in reasons.items()} for name, reasons in manifest.get("unused", {}).items()}


def _way_back(output: str, folder: Path) -> str:
    """The way from the recipe's output path to the recipe's folder, as a manifest has it."""
    home = os.path.abspath(folder)
    return os.path.relpath(home, os.path.join(home, output))


def _prove(
    mixture: Mixture, order: Order, staging: Staging, target: Path, options: MergeOptions, device: Any, record: Mapping[str, Any]
) -> None:
    """Verify the copy: all of it where a merge recorded it, and the routers anyway. Raises VerificationFailed, keeping it."""
    assert options.level is not None
    options.notify("verifying" if options.level == "quick" else f"verifying, {options.level}")
    report = Report(options.level, mixture.names)
    if mixture.manifest is not None:
        report = verify(
            staging.output, order.plan, options=VerifyOptions(options.level, options.device, options.workers, options.on_verify)
        )
    if order.plan is None:
        fresh = open_mixture(staging.output)
        of = [_proof(router, order) for router in order.wanted]
        report.checks = [check for check in report.checks if check.name != "calibration"]
        with computing_on(device, torch_workers(options.workers)) as computing:
            way = Way(LEVELS[options.level], computing)
            report.add(router_checks(fresh.stored, of, lambda: fresh.stored, record["accuracy"], way))
    if report.ok:
        options.notify("trying the mixture on its texts")  # which takes minutes, and is no part of what on_verify tells
        texts, made_of = further_texts(order.corpora, mixture.names), tokens_made_of({"calibration": record})
        with computing_on(device, torch_workers(options.workers)) as computing:
            try_on_texts(open_folder(staging.output), order.plan, texts, report, computing, made_of, own_alone=True)
    options.on_report(report)
    if not report.ok:
        refuse(staging, target, [f"{check.name}: {check.detail}" for check in report.failures])


def _proof(router: Any, order: Order) -> Asked:
    return Asked(
        router.name, router.role, router.layer, router.dtype, router.method, router.names, router.inputs, router.corpus,
        order.expressions[router.name],
    )  # fmt: skip
