"""The travelling code and the card of a folder that an older version made, as this version writes them. The weights are not touched.

A new folder is put together beside the old one, of links to the weights, copies of what is small and what is new, and takes its place in
one step: a crash in the middle leaves the old one as it was. The manifest says which version wrote which files anew.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from bam_merge._version import __version__
from bam_merge.checkpoints.folder import CONFIG, read_small_file
from bam_merge.checkpoints.provenance import MANIFEST, REFRESHED, SEAL, read_manifest, refreshed, sealed
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError, DurabilityUncertain, OutputError, VerificationFailed
from bam_merge.files import begun_anew, write_file, writing
from bam_merge.paths import located
from bam_merge.planning.card import TEMPLATES_APART, Beside, has_chat_template, model_card
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan
from bam_merge.publishing.companions import model_code
from bam_merge.publishing.destination import lack_of_space, occupied
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.publish import put_in_place
from bam_merge.publishing.replacing import contents, opened
from bam_merge.publishing.staging import JOURNAL, Staging, staging_folder
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.licenses import License, source_licenses
from bam_merge.sources.recipe_places import at_hand
from bam_merge.system import sync
from bam_merge.text import printable, some

CARD = "README.md"


NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EACCES)
"""What systems say where a file cannot have a second name."""


def refresh(folder: str | os.PathLike[str], plan: Plan | None = None, notify: Callable[[str], None] | None = None) -> tuple[str, ...]:
    """Renew code and card of the merged `folder`; the names of the files that are new, none where all are as this version writes them.

    The card follows from the sources, those of `plan` or of the manifest; where they are not at hand, or changed since, it stays and
    `notify` is told. Raises VerificationFailed where a check of verify fails that needs the folder alone, but for older code, and
    OutputError where the folder cannot be replaced; nothing is changed then.
    """
    target = Path(os.path.realpath(located(folder, error=OutputError)))
    manifest = read_manifest(target)
    _check_older(target, manifest)
    _check_true(target, manifest)
    _check_replaceable(target)
    say = notify or (lambda text: None)
    new, manifest = _renewed(target, manifest, plan, say)
    if new:
        _replace(target, new, manifest, say)
    return tuple(sorted(new))


def _check_older(target: Path, manifest: Mapping[str, Any]) -> None:
    """Raise OutputError for what a newer version wrote: its code may compute what this one's does not."""
    again = refreshed(manifest)
    for writer in (str(manifest.get("version")), *([again.version] if again is not None else [])):
        if _numbers(writer) > _numbers(__version__):
            shown = f"{printable(str(target))}: written by bam-merge {printable(writer)}, this is {__version__}"
            raise OutputError(f"{shown}. Refresh it with that version or a later one.")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d{1,9}", version)]


def _check_true(target: Path, manifest: Mapping[str, Any]) -> None:
    """Raise VerificationFailed unless the manifest is true of the folder. Which code is there is not asked: it will be this version's."""
    from bam_merge.verifying.alone import folder_checks  # which needs torch

    failures = [check for check in folder_checks(target, manifest) if check.ok is False and check.name != "code"]
    if failures:
        shown = printable(str(target))
        raise VerificationFailed(
            *(f"{check.name}: {check.detail}" for check in failures), f"{shown} was not refreshed: bam-merge verify refuses it as it is."
        )


def _check_replaceable(target: Path) -> None:
    """Raise OutputError where the folder cannot be replaced by a new one."""
    shown = printable(str(target))
    with opened(target) as descriptor:
        foreign = contents(descriptor).foreign
    if foreign:
        raise OutputError(f"{shown} holds {some(foreign, 8)}, which is not of the merge. Move it elsewhere, refresh, and move it back.")
    if (staging_folder(target) / JOURNAL).exists():
        raise OutputError(
            f"{shown}: an unfinished merge into it is in {printable(str(staging_folder(target)))}. Finish it (--resume) first."
        )
    if problems := occupied(target, force=True):
        raise OutputError(*problems)


# ---- what is new ---------------------------------------------------------------------------------------------------------------


def _renewed(
    target: Path, manifest: Mapping[str, Any], plan: Plan | None, notify: Callable[[str], None]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files that are other than they are there, and the manifest that is then true."""
    config = load_json(read_small_file(target / CONFIG))
    documents = model_code(config)
    found = {key: value for key, value in manifest.items() if key not in (SEAL, REFRESHED)}
    try:
        card, licenses = _card(target, manifest, plan)
        documents[CARD] = card.encode()
        found["sources"] = {
            name: {**record, **(licenses[name].entries() if name in licenses and "license" not in record else {})}
            for name, record in manifest["sources"].items()
        }
    except BamMergeError as error:
        notify(f"{CARD} stays as it is: {error.problems[0]}")
    new = {name: data for name, data in documents.items() if data != read_small_file(target / name)}
    found["files"] = {**manifest["files"], **{name: xxhash.xxh3_128_hexdigest(data) for name, data in new.items()}}
    found[REFRESHED] = {"version": __version__, "files": sorted(documents)}
    return new, found


def _card(target: Path, manifest: Mapping[str, Any], given: Plan | None) -> tuple[str, Mapping[str, License]]:
    """The card that this version writes, and the licenses in it. Raises BamMergeError where it does not follow from the sources."""
    from bam_merge.verifying.sources import changes, opened_afar

    home = Path(os.path.normpath(target / str(manifest.get("recipe_folder", "."))))
    recorded = parse_recipe(manifest["recipe"], home, str(target / MANIFEST)).of_document()
    plan = given if given is not None and not given.remotes else make_plan(at_hand(given.recipe if given is not None else recorded))
    found = changes(plan.recipe, manifest, opened_afar(plan))
    if found.absent or found.names() or plan.recipe.stores.keys() != manifest["sources"].keys():
        raise OutputError(
            f"it follows from the sources, and these changed since the merge: {found.names() or some(found.absent) or 'others'}."
        )
    _check_same(plan, manifest)
    stated = {name: License.of_entries(record) for name, record in manifest["sources"].items()}
    licenses = {**source_licenses(plan.recipe), **{name: license_ for name, license_ in stated.items() if license_ is not None}}
    beside = {name: read_small_file(target / name) for name in {*TEMPLATES_APART, "tokenizer_config.json"} & manifest["files"].keys()}
    about = Beside(licenses, has_chat_template(beside), str(manifest["version"]), __version__)
    return model_card(replace(plan, recipe=_as_recorded(recorded, plan)), about), licenses


def _as_recorded(recorded: Recipe, plan: Plan) -> Recipe:
    """The recipe that the card shows: the manifest's, so that the places of its sources are those."""
    return recorded if recorded.stores.keys() == plan.recipe.stores.keys() else plan.recipe


def _check_same(plan: Plan, manifest: Mapping[str, Any]) -> None:
    """Raise OutputError where the recipe would make other tensors now."""
    now = {step.name: (step.expression, step.dtype, list(step.shape)) for step in plan.steps}
    then = {name: (record["expression"], record["dtype"], record["shape"]) for name, record in manifest["tensors"].items()}
    if other := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
        raise OutputError(f"this version would make other tensors of the recipe: {some(other)}.")


# ---- in its place --------------------------------------------------------------------------------------------------------------


@begun_anew()
def _replace(target: Path, new: Mapping[str, bytes], manifest: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    """A folder of the old files and the new ones takes the place of the old one, in one step."""
    staging = Staging.open(target, notify)
    try:
        staging.begin_afresh()
        with writing(staging.output), opened(target) as old:
            os.fchmod(staging.files, os.fstat(old).st_mode & 0o7777)
            for name in manifest["shards"]:
                _keep(name, old, staging, target, notify)
        small = {name: read_small_file(target / name) for name in manifest["files"] if name not in new}
        for name, data in {**small, **new, MANIFEST: sealed(manifest)}.items():
            write_file(staging.output / name, data, staging.files)
        sync_descriptor(staging.files, staging.output)
        _check_new(staging, target)
        put_in_place(staging, target, force=True)
    except DurabilityUncertain:  # it is in its place
        raise
    except BaseException:
        staging.remove()
        raise
    finally:
        staging.close()


def _check_new(staging: Staging, target: Path) -> None:
    """Raise unless the new folder is what its manifest says: files, headers and code (what is linked was proved before)."""
    from bam_merge.architectures.opening import open_folder
    from bam_merge.verifying.files import file_checks
    from bam_merge.verifying.record import contradictions

    manifest, checkpoint = read_manifest(staging.output), open_folder(staging.output)
    failures = [f"{check.name}: {check.detail}" for check in file_checks(staging.output, manifest, checkpoint) if check.ok is False]
    failures += [f"provenance: {text}" for text in contradictions(checkpoint, manifest)]
    if failures:
        raise VerificationFailed(*failures, f"{printable(str(target))} was not refreshed, and is as it was.")
    if not staging.is_ours():
        raise OutputError(f"{printable(str(staging.folder))} was deleted meanwhile. Nothing was changed; run again.")


def _keep(name: str, old: int, staging: Staging, target: Path, notify: Callable[[str], None]) -> None:
    """The same file in the new folder: a second name of it, or a copy where the file system gives none. Raises OSError."""
    try:
        os.link(name, name, src_dir_fd=old, dst_dir_fd=staging.files, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        size = os.stat(name, dir_fd=old, follow_symlinks=False).st_size
        if lack := lack_of_space(size, target, "a copy takes"):
            raise OutputError(lack) from None
        notify(f"{printable(name)}: this file system gives a file no second name, so it is copied.")
        _copy(name, old, staging.files)


def _copy(name: str, old: int, new: int) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=old)
    with os.fdopen(source, "rb") as reader:
        copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=new)
        with os.fdopen(copy, "wb") as writer:
            shutil.copyfileobj(reader, writer, 2**20)
            writer.flush()
            sync(writer.fileno())
