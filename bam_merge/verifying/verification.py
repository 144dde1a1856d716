"""Verification: the result proves itself, from its bytes to what it computes, against its own sources by other code than made it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bam_merge import expressions
from bam_merge._version import __version__
from bam_merge.architectures.opening import open_folder
from bam_merge.calibrating.texts import Files
from bam_merge.checkpoints.adapter_folder import ADAPTER_CONFIG
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.provenance import MANIFEST, format_note, read_manifest, recorded_experts
from bam_merge.errors import BamMergeError, CheckpointError, VerifyError
from bam_merge.model.streaming import computing_on
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.places import local
from bam_merge.sources.recipe_places import at_hand
from bam_merge.text import printable, some
from bam_merge.verifying.aligned import rows_are_tokens
from bam_merge.verifying.calibrated import tokens_of_texts
from bam_merge.verifying.card import card_check
from bam_merge.verifying.companions import companion_check
from bam_merge.verifying.devices import open_device, torch_workers
from bam_merge.verifying.engines import engines
from bam_merge.verifying.files import OnHub, file_checks, not_downloaded
from bam_merge.verifying.function import function_checks as _function
from bam_merge.verifying.heldout import further_texts, read_domains, tokens_made_of, tokens_tried
from bam_merge.verifying.levels import LEVELS
from bam_merge.verifying.options import VerifyOptions, check_level
from bam_merge.verifying.perplexity import read_texts, unnamed
from bam_merge.verifying.processors import processor_check
from bam_merge.verifying.proof import NOTHING, Known
from bam_merge.verifying.record import contradictions, first_problems, nonfinite_problems, places, record_problems
from bam_merge.verifying.report import Check, Report, timed
from bam_merge.verifying.sources import Changes, changes, opened_afar, other_tensors
from bam_merge.verifying.stored import Compared, against_sources, digests, not_computed, structure
from bam_merge.verifying.tried import try_on_texts
from bam_merge.verifying.work import Work

MOST_KEYS = 8
"""Wrong keys of config.json that are named."""


def verify(
    folder: str | os.PathLike[str],
    plan: Plan | None = None,
    texts: Sequence[str | os.PathLike[str]] = (),
    options: VerifyOptions | None = None,
    domains: Mapping[str, Files] | None = None,
) -> Report:
    """Verify the merged folder; with `texts`, also measure perplexities, and with `domains` what the routers do with texts whose expert is
    known: by its name a file, a folder or a glob, or a list of these.

    The sources are those of `plan`, or are found from the manifest; without them only digests and the model itself are checked, and
    the report says so. Raises VerifyError when the folder has no manifest, CheckpointError for a text that cannot be read, or a folder
    that changes meanwhile.
    """
    return verify_rest(NOTHING, folder, plan, texts, options, domains)


def verify_rest(
    found: Known,
    folder: str | os.PathLike[str],
    plan: Plan | None = None,
    texts: Sequence[str | os.PathLike[str]] = (),
    options: VerifyOptions | None = None,
    domains: Mapping[str, Files] | None = None,
) -> Report:
    """`verify`, of which other processes have `found` a part already: the same report."""
    options = options or VerifyOptions()
    check_level(options.level)
    level, device = LEVELS[options.level], open_device(options.device)
    workers = torch_workers(options.workers)
    path, snapshot = local(folder, VerifyError, MANIFEST)
    manifest = read_manifest(path)
    ids = read_texts(path, texts)
    known = read_domains(path, domains or {}, _routed_experts(manifest["recipe"]))
    left = not_downloaded(manifest, snapshot)
    if plan is not None and plan.remotes:
        plan = make_plan(at_hand(plan.recipe, ranges=options.ranges))
    report = Report(level.name, tuple(map(printable, recorded_experts(manifest["recipe"]) or ())))
    try:
        checkpoint = open_folder(path)
    except BamMergeError as error:  # nothing more can be read
        report.add([*file_checks(path, manifest, None, left), Check("headers", False, "; ".join(error.problems))])
        return report
    report.add(file_checks(path, manifest, checkpoint, left))
    report.add(structure(checkpoint, manifest))
    report.add(engines(checkpoint))
    work = Work(options.progress)
    given = sum(ids_WT.numel() for ids_WT in ids.values()) + sum(text.tokens for text in known)
    work.plan(checkpoint, tokens_of_texts(manifest), given + (tokens_tried(manifest) if options.try_routers else 0))
    measured: dict[str, str | None] = {}
    report.add(digests(checkpoint, manifest, work, workers, found.digests, measured))
    wrong_counts, nonfinite = nonfinite_problems(checkpoint, manifest)
    wrong = [*contradictions(checkpoint, manifest), *wrong_counts]
    sources = _Sources(checkpoint, manifest, report, wrong, work, workers, left, found, found.of(measured), options.ranges)
    plan = sources.compare(plan)
    if (reason := not_computed(manifest, nonfinite)) is not None:
        report.add([Check("model", None, reason)])
        return report
    with computing_on(device, workers) as computing:
        try:
            report.add(_function(checkpoint, plan, frozenset(sources.proved), report, level, computing, work, manifest, found.layers))
        except CheckpointError as error:
            report.add([Check("model", False, "; ".join(error.problems))])
            return report
        corpora = plan.calibration.corpora if plan is not None and plan.calibration is not None else None
        tried = further_texts(corpora, report.experts) if corpora is not None and options.try_routers and report.ok else []
        if ids or known or tried:
            texts_tried, advancing = [*unnamed(ids), *known, *tried], partial(work.advancing, "texts")
            try_on_texts(checkpoint, plan, texts_tried, report, computing, tokens_made_of(manifest), bool(tried), advancing)
    work.finish("texts")
    return report


def _routed_experts(recipe: Mapping[str, Any]) -> Sequence[str]:
    """The names of the experts that routers choose from; none where the result is dense."""
    return recipe.get("experts", ()) if recipe.get("method") != "merge" else ()


# ---- against the sources -----------------------------------------------------------------------------------------------------


@dataclass
class _Sources:
    """Compares a folder with its sources, as far as they are at hand and still what was merged.

    `wrong` collects what the manifest says wrongly; `left` is what of the folder is on the hub alone. Of what other processes have `found`,
    `compared` holds of the bytes that are there.
    """

    checkpoint: Checkpoint
    manifest: dict[str, Any]
    report: Report
    wrong: list[str]
    work: Work
    workers: int
    left: OnHub | None = None
    found: Known = NOTHING
    compared: Mapping[str, Compared] = field(default_factory=dict)
    ranges: bool = False
    proved: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.checkpoint.path

    def compare(self, given: Plan | None) -> Plan | None:
        """Add every check that needs sources; the plan whose models the output can be compared with, if there is one."""
        same_version = self.manifest.get("version") == __version__
        recorded = self._recorded(same_version)
        recipe = given.recipe if given is not None else self._at_hand(recorded)
        if recipe is None:
            self._record(None, same_version)
            return None
        plan, why = (given, None) if given is not None else _planned(recipe)
        opened = plan.checkpoints if plan is not None and given is None else opened_afar(given)  # a plan that was given can be an old one
        found = changes(recipe, self.manifest, opened)
        companions = {name: found.companions.get(recipe.model_store(name), []) for name in recipe.sources}
        for compare in (companion_check, processor_check):
            if (check := compare(self.folder, recipe, self.manifest, companions)) is not None:
                self.report.add([check])
        if why is not None:
            self._unplanned(why, found, same_version)
        compared = None if plan is None else self._tensors(plan, found)
        if plan is not None and compared is not None:
            givers = {recipe.seed_name, plan.alignment.giver if plan.alignment is not None else recipe.seed_name}
            changed_seed = any(found.configs.get(recipe.model_store(name), []) != [] for name in givers)
            config = _config_check(self.checkpoint.config, plan, changed_seed)
            card = card_check(self.folder, plan, self.manifest, recorded or recipe, self.left)
            if changed_seed and card.ok is False:
                card = Check("card", None, f"sources.{printable(recipe.seed_name)}: config.json changed since the merge; {card.detail}")
            self.report.add([config, card, *compared])
            self._unchanged(plan, found, all(check.ok for check in compared))
            moved = places(recipe, self.manifest) if given is not None else []
            if moved:
                self.report.add([Check("places", None, f"the manifest's are not those of the recipe: {some(moved)}")])
        self._record(plan if compared is not None else None, same_version)
        return plan if compared is not None and config.ok is not None else None

    def _recorded(self, same_version: bool) -> Recipe | None:
        """The manifest's recipe, standing where its output path leads back from the folder."""
        home = os.path.normpath(self.folder.absolute() / str(self.manifest.get("recipe_folder", ".")))
        try:
            return parse_recipe(self.manifest["recipe"], Path(home), str(self.folder / MANIFEST)).of_document()
        except BamMergeError as error:
            self._not_at_hand(error)
            if same_version:
                self.wrong.append(f"its recipe is none: {error.problems[0]}")
            return None

    def _at_hand(self, recipe: Recipe | None) -> Recipe | None:
        """The recipe with the models of the hub that it names downloaded."""
        try:
            return at_hand(recipe, ranges=self.ranges) if recipe is not None else None
        except BamMergeError as error:
            self._not_at_hand(error)
            return None

    def _not_at_hand(self, error: BamMergeError) -> None:
        what = f"not at hand, so digests only: {error.problems[0]} (--recipe names them). Not compared: {NEED_SOURCES}"
        self.report.add([Check("sources", None, what)])

    def _unplanned(self, error: BamMergeError, found: Changes, same_version: bool) -> None:
        if names := found.names():
            why = f"changed since the merge, so digests only: {names}. {error.problems[0]}"
            self.report.add([Check("sources", None, why)])
        elif found.absent or not same_version:
            self._not_at_hand(error)
        else:
            self.wrong.append(f"its recipe gives no plan, though its sources are there as it records them: {error.problems[0]}")

    def _tensors(self, plan: Plan, found: Changes) -> list[Check] | None:
        """The checks of all tensors against the sources. None where the weights changed, and what can be compared was added."""
        if plan.alignment is not None and (other_tokens := found.tokenizers()):
            why = f"changed since the merge, so digests only: {other_tokens}, by which tokens were aligned"
            self.report.add([Check("sources", None, why)])
            rest = tuple(step for step in plan.steps if not rows_are_tokens(step.role))
            self.report.add(self._against(replace(plan, steps=rest)))
            return None
        changed = [name for name in found.weights if name in plan.checkpoints]
        other = other_tensors(plan, self.manifest, changed) if changed else {}
        for name in (name for name in changed if name not in other):
            self.wrong.append(f"sources.{printable(name)}: {some(found.weights[name])} {SAVED_AGAIN.format('tensors')}")
        checks = list(timed(self._against(plan)))
        if not all(check.ok for check in checks):  # an adapter's configuration says by how much its tensors change the base's
            other |= {name: [ADAPTER_CONFIG] for name in found.adapters if found.configs.get(name) and name not in other}
        if not other or all(check.ok for check in checks):
            for name, tensors in other.items():
                self.wrong.append(
                    f"sources.{printable(name)}: {some(tensors)} recorded with other digests, though the output follows from it"
                )
                found.weights.pop(name)
            names = found.names(weights=False)
            self.report.add(
                [Check("sources", None, f"changed since the merge: {names}") if names else Check("sources", True, _folders(plan))]
            )
            return checks
        self.report.add([Check("sources", None, f"changed since the merge, so digests only: {found.names()}")])
        rest = tuple(step for step in plan.steps if not any(read.source in other for read in expressions.reads(step.expr)))
        self.report.add(against_sources(self.checkpoint, replace(plan, steps=rest), self.manifest, self.work, self.workers))
        return None

    def _against(self, plan: Plan) -> Iterator[Check]:
        return against_sources(self.checkpoint, plan, self.manifest, self.work, self.workers, self.proved, self.compared)

    def _unchanged(self, plan: Plan, found: Changes, follows: bool) -> None:
        """The manifest's digests of what was read are those of what is there."""
        for name, keys in found.configs.items():
            if keys == []:
                self.wrong.append(f"sources.{printable(name)}: config.json {SAVED_AGAIN.format('keys')}")
        if follows:  # else it is said of the tensor that fails
            names = [name for name in self.manifest["sources"] if name in plan.checkpoints and name not in found.weights]
            for name, tensors in other_tensors(plan, self.manifest, names, proved=True, known=self.found.sources).items():
                what = "not as the manifest records it: it changed since the merge, or the record is not the merge's"
                self.wrong.append(f"sources.{printable(name)}: {some(tensors)} {what}")

    def _record(self, plan: Plan | None, same_version: bool) -> None:
        derived = record_problems(plan, self.manifest) if plan is not None else []
        if self.wrong or (derived and same_version):
            check = Check("provenance", False, first_problems([*self.wrong, *derived]))
        elif derived:
            version = printable(str(self.manifest["version"]))
            check = Check(
                "provenance", None, f"written by bam-merge {version}, this is {__version__}, which records: {first_problems(derived)}"
            )
        elif plan is None:
            check = Check("provenance", True, "does not contradict itself; what follows from the sources was not compared")
        else:
            check = Check("provenance", True, "recipe, expressions and digests follow from the sources")
        self.report.add([check])
        if note := format_note(self.manifest):
            self.report.add([Check("reads", None, note)])


def _planned(recipe: Recipe) -> tuple[Plan | None, BamMergeError | None]:
    """The plan, or why there is none."""
    try:
        return make_plan(recipe), None
    except BamMergeError as error:
        return None, error


NEED_SOURCES = "tensors, config.json, tokenizer and generation files, model card, expressions"
"""What nothing but the sources can prove."""


SAVED_AGAIN = "is not the file that the manifest records, though its {} are: it was saved again since the merge, or the record is forged"


def _folders(plan: Plan) -> str:
    return f"{len(plan.checkpoints)} folders, as they were merged"


def _config_check(found: Mapping[str, Any], plan: Plan, changed_seed: bool) -> Check:
    """config.json against the one that the sources and the recipe lead to, key by key. Not where the seed's changed since the merge."""
    wrong = [
        f"{key} is {_shown(found, key)}, the sources and the recipe give {_shown(plan.config, key)}"
        for key in sorted({*found, *plan.config})
        if key not in found or key not in plan.config or json.dumps(found[key]) != json.dumps(plan.config[key])  # 1 is not true
    ]
    more = [f"and {len(wrong) - MOST_KEYS} more keys"] if len(wrong) > MOST_KEYS else []
    detail = "; ".join([*wrong[:MOST_KEYS], *more])
    if wrong and changed_seed:
        why = (
            f"sources.{printable(plan.recipe.seed_name)}: config.json changed since the merge, so the model is not compared with it either"
        )
        return Check("config", None, f"{why}: {detail}")
    return Check("config", not wrong, detail or f"{len(found)} keys follow from the sources and the recipe")


def _shown(config: Mapping[str, Any], key: str) -> str:
    return printable(repr(config[key]), 60) if key in config else "missing"
