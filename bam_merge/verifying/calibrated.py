"""Do the routers that were made of texts follow from them? By another pass, other sums and another solution than made them.

The models are verification's own reading of the sources, or the finished mixture itself, each window by itself through every block; second
moments are always D x D, added up and solved by numpy. What both ways have in common: the reference model's blocks, and the tokens that the
plan has read, whose files' bytes are digested again. Bits are not the same, so a row may be off by a share of its length.

Shape suffixes:  T tokens of a window    M tokens    D hidden_size    K texts
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

from bam_merge import expressions
from bam_merge.calibrating.corpus import Corpus
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Read
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.model import Block
from bam_merge.model.streaming import streamed_block, streamed_embeddings
from bam_merge.planning.plan import Plan
from bam_merge.text import count, printable, some
from bam_merge.verifying.aligned import in_result_ids
from bam_merge.verifying.conversion import open_dense
from bam_merge.verifying.measuring import Way
from bam_merge.verifying.report import Check

Matrix = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


ROW_TOLERANCE = {"seed": 1e-3, "mixture": 2e-2}
"""How far a row may be from the one worked out here, relative to its length, beside the rounding to its dtype. Two passes differ in the
last bits of float32, which the solution of the sums amplifies; a mixture also sends a token here and there to another expert."""


ACCURACY_TOLERANCE = 0.01
"""How far a recorded share of tokens may be from the one that is measured here."""


TRIED = 1024
"""Tokens of each text that routers are tried on, where there are no further ones: the windows that begin before the text's 1,024th."""


def calibration_checks(checkpoint: Checkpoint, plan: Plan | None, manifest: Mapping[str, Any], way: Way) -> Iterator[Check]:
    """Whether every router that is made of texts follows from them, and what is recorded of texts and routers is so."""
    if "calibration" not in manifest and (plan is None or plan.calibration is None):
        return
    if plan is None or plan.calibration is None or plan.calibration.absent:
        why = "the sources are not at hand" if plan is None or plan.calibration is None else "; ".join(plan.calibration.absent)
        yield Check("calibration", None, f"not run, so that routers have their digests alone: {why}")
        return
    yield _texts(plan, manifest)
    mixture, given = stored_model(checkpoint), plan

    def seed() -> StoredModel:
        return in_result_ids(checkpoint.path, given, open_dense(given), mixture.config.vocab_size)[given.recipe.seed_name]

    yield from router_checks(mixture, asked_of(plan), seed, manifest.get("calibration", {}).get("accuracy", {}), way)


def tokens_of_texts(manifest: Mapping[str, Any]) -> int:
    """How many tokens a manifest says were read of texts."""
    places = manifest.get("calibration", {}).get("texts", {})
    found = [text for place in places.values() for text in place["texts"].values()]
    return sum(tokens for tokens in {text["digest"]: text["tokens"] + text["further"] for text in found}.values())


# ---- texts ---------------------------------------------------------------------------------------------------------------------


def _texts(plan: Plan, manifest: Mapping[str, Any]) -> Check:
    """The files that were read still have the recorded digests, and the record says what the plan reads of them."""
    assert plan.calibration is not None
    recorded = manifest.get("calibration", {}).get("texts", {})
    wrong, changed, read = [], [], 0
    if recorded != plan.calibration.document():
        wrong.append("the record is not what the recipe's texts give: tokens, bytes or digests differ")
    for place, corpus in plan.calibration.corpora.items():
        make = plan.recipe.from_texts[place]
        for name, text in corpus.texts.items():
            if name not in (make.texts or {}):
                continue
            for part in text.parts:
                read += 1
                if _digest(plan.recipe.folder / part.name, part.nbytes) != part.digest:
                    changed.append(f"{place}.texts.{name}: {part.name}")
    if changed:
        return Check("texts", None, f"changed since they were read: {some(changed)}")
    return Check("texts", not wrong, "; ".join(wrong) or f"{count(read, 'file')} as they were read")


def _digest(path: Path, nbytes: int) -> str | None:
    try:
        with open(path, "rb") as stream:
            return xxhash.xxh3_128_hexdigest(stream.read(nbytes))
    except OSError:
        return None


# ---- routers -------------------------------------------------------------------------------------------------------------------


@dataclass
class _Inputs:
    """What a rule needs of a router's inputs, by text: how many, their sums, and the mean of the texts' second moments."""

    counts: dict[str, int] = field(default_factory=dict)
    totals: dict[str, Matrix] = field(default_factory=dict)
    seconds: dict[str, Matrix] = field(default_factory=dict)
    tried: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, x_MD: Tensor, moments: bool) -> None:
        x = x_MD.double().cpu().numpy()
        self.counts[name] = self.counts.get(name, 0) + len(x)
        self.totals[name] = self.totals.get(name, 0.0) + x.sum(0)
        if moments:
            self.seconds[name] = self.seconds.get(name, 0.0) + x.T @ x

    def mean(self, name: str) -> Matrix:
        result: Matrix = self.totals[name] / self.counts[name]
        return result


@singledispatch
def derived(method: expressions.Calibrator, inputs: _Inputs, negative: _Inputs, names: tuple[str, ...]) -> Matrix:
    """The rows [K, D] of the texts called `names`, one function for each record."""
    raise NotImplementedError(f"verifying/calibrated.py derives no {type(method).__name__}: a function under @derived.register is missing")


@derived.register
def _ridge(method: expressions.Ridge, inputs: _Inputs, negative: _Inputs, names: tuple[str, ...]) -> Matrix:
    second = numpy.mean([inputs.seconds[name] / inputs.counts[name] for name in names], axis=0)
    means = numpy.stack([inputs.mean(name) for name in names])
    wanted = numpy.eye(len(names)) - (1.0 if method.sigmoid else 1 / len(names))  # for row j, of text k's tokens
    right = wanted @ means / len(names)
    regular = second + method.penalty * numpy.trace(second) / len(second) * numpy.eye(len(second))
    return numpy.asarray(method.scale * numpy.linalg.solve(regular, right.T).T)


@derived.register
def _hidden_mean(method: expressions.HiddenMean, inputs: _Inputs, negative: _Inputs, names: tuple[str, ...]) -> Matrix:
    means = numpy.stack([inputs.mean(name) for name in names])
    typical = numpy.stack([inputs.mean(name) - (negative.mean(name) if name in negative.counts else 0.0) for name in names])
    rows = typical / numpy.sqrt((typical**2).sum(1, keepdims=True))
    rows = rows - rows.mean(0)
    own = rows @ means.T
    margins = [own[j, j] - (own[:, j].sum() - own[j, j]) / (len(names) - 1) for j in range(len(names))]
    rows = method.scale / numpy.mean(margins) * rows
    if method.sigmoid:  # lowered by what gives the mean of all texts, each weighing the same, -(1 - 1/N) scale
        whole = means.sum(0)
        rows = rows - method.scale * (len(names) - 1) * whole / (whole @ whole)
    return numpy.asarray(rows)


@dataclass(frozen=True)
class Asked:
    """One router that is to follow from its texts: tensor, place, dtype, the rule, and the text of each row's source."""

    name: str
    role: str
    layer: int
    dtype: str
    method: expressions.Calibrator
    names: tuple[str, ...]
    inputs: str
    corpus: Corpus
    expression: str

    @property
    def distinct(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names))


def asked_of(plan: Plan) -> list[Asked]:
    """The routers of a plan that are made of texts."""
    assert plan.calibration is not None
    return [
        Asked(
            step.name, step.role, step.layer or 0, step.dtype, step.expr.method, step.expr.names, step.expr.inputs,
            plan.calibration.corpora[step.expr.of], step.expression,
        )
        for step in plan.steps
        if isinstance(step.expr, expressions.Calibrated)
    ]  # fmt: skip


@torch.no_grad()
def router_checks(
    mixture: StoredModel, asked: Sequence[Asked], seed: Callable[[], StoredModel], recorded: Mapping[str, Any], way: Way
) -> Iterator[Check]:
    """Every router against its rows as they are worked out here, and its recorded accuracy. `seed` opens the source of that name."""
    wrong, worst, bound, accuracies = list[str](), 0.0, 0.0, list[str]()
    for inputs in dict.fromkeys(router.inputs for router in asked):
        of = [router for router in asked if router.inputs == inputs]
        for router, seen, negative in _passed(mixture if inputs == "mixture" else seed(), of, way):
            error, accuracy = _compared(mixture, router, seen, negative)
            allowed = ROW_TOLERANCE[inputs] + _rounding(router.dtype)
            if error / allowed >= worst / max(bound, 1e-300):
                worst, bound = error, allowed
            if not error <= allowed:
                wrong.append(f"{router.name} ({error:.3g} of a row's length off, expected {router.expression})")
            said = recorded.get(router.name, {}).get("tokens")
            if not isinstance(said, float | int) or abs(said - accuracy) > ACCURACY_TOLERANCE:
                accuracies.append(f"{router.name} ({said}, measured {accuracy:.4f})")
    extra = sorted(recorded.keys() - {router.name for router in asked})
    detail = f"{len(asked)} routers follow from their texts, by a pass of our own" + ("" if way.level.thorough else " in float32")
    yield Check("calibration", not wrong, some(wrong) if wrong else detail, worst, bound)
    accuracies += [f"{printable(name)} is no such router" for name in extra]
    yield Check("accuracy", not accuracies, some(accuracies) if accuracies else "as it is recorded", None, ACCURACY_TOLERANCE)


def _rounding(dtype: str) -> float:
    """The largest error of rounding a number to `dtype`, relative to it."""
    return {"BF16": 2.0**-8, "F16": 2.0**-10}.get(dtype, 2.0**-23)


def _compared(mixture: StoredModel, router: Asked, seen: _Inputs, negative: _Inputs) -> tuple[float, float]:
    """How far the worst row is from what it should be, relative to its length; and the share of tokens that go to their text's expert."""
    names = router.distinct
    rows = derived(router.method, seen, negative, names)
    wanted = numpy.stack([rows[names.index(name)] for name in router.names])
    parameter = next(name for name, leaf in mixture.leaves.items() if isinstance(leaf, Read) and leaf.tensor == router.name)
    stored = mixture.read(parameter).double()
    lengths = numpy.sqrt((wanted**2).sum(1)).clip(min=1e-300)
    error = float((numpy.sqrt(((stored.numpy() - wanted) ** 2).sum(1)) / lengths).max())
    right, total = 0, 0
    chosen_N = numpy.array([names.index(name) for name in router.names])
    for name, tried in seen.tried.items():
        for x_MD in tried:
            right += int((chosen_N[(x_MD.float().cpu() @ stored.float().T).argmax(-1).numpy()] == names.index(name)).sum())
            total += len(x_MD)
    return (error if error == error else float("inf")), right / max(1, total)


def _passed(model: StoredModel, of: Sequence[Asked], way: Way) -> Iterator[tuple[Asked, _Inputs, _Inputs]]:
    """The routers of each layer with what they see of their texts, and of what is not typical of these, window by window."""
    computing = way.precisions[0]
    corpora = {id(router.corpus): router.corpus for router in of}
    distinct = {ids for corpus in corpora.values() for text in corpus.all for ids in (*text.windows, *text.further)}
    states = {ids: streamed_embeddings(model, torch.tensor([ids]), computing) for ids in sorted(distinct)}
    for layer in range(1 + max(router.layer for router in of)):
        block = streamed_block(model, layer, computing)
        here = [router for router in of if router.layer == layer]
        found = {router.name: (_Inputs(), _Inputs()) for router in here}
        by_window: dict[tuple[int, ...], list[tuple[Asked, str, str]]] = {}
        for router in here:
            for kind, name, ids in _uses(router.corpus):
                by_window.setdefault(ids, []).append((router, kind, name))
        for ids, x_1TD in states.items():
            seen, hidden = _run(block, x_1TD)
            for router, kind, name in by_window.get(ids, ()):
                _note(found[router.name], kind, name, seen[router.role], isinstance(router.method, expressions.Ridge))
            states[ids] = hidden
        way.ran(layer)
        yield from ((router, *found[router.name]) for router in here)


def _uses(corpus: Corpus) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(kind, source, window): what is a router made of, and what tried on."""
    further = all(text.further for text in corpus.texts.values())
    for name, text in corpus.texts.items():
        before = 0
        for ids in text.windows:
            yield "made", name, ids
            if not further and before < TRIED:
                yield "tried", name, ids
            before += len(ids)
        if further:
            yield from (("tried", name, ids) for ids in text.further)
    for name, text in corpus.negative.items():
        yield from (("negative", name, ids) for ids in text.windows)


def _note(found: tuple[_Inputs, _Inputs], kind: str, name: str, x_MD: Tensor, moments: bool) -> None:
    if kind == "tried":
        found[0].tried.setdefault(name, []).append(x_MD)
    else:
        found[kind == "negative"].add(name, x_MD, moments and kind == "made")


def _run(block: Block, x_1TD: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the routers of a block see of a window but its first token [M, D], and the hidden states after it."""
    seen: dict[str, Tensor] = {}
    handles = [
        block.self_attn.register_forward_hook(lambda module, args, out: seen.update({"router.attn": args[0][0, 1:]})),
        block.mlp.register_forward_hook(lambda module, args, out: seen.update({"router.ffn": args[0][0, 1:]})),
    ]
    try:
        return seen, block(x_1TD, torch.arange(x_1TD.shape[1], device=x_1TD.device)[None]).hidden
    finally:
        for handle in handles:
            handle.remove()
