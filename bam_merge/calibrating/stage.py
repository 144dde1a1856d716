"""The pass over texts that makes routers: a model block by block, and after each block the rows of its routers.

Bytes are the same for any number of threads on one machine: what is added up, and in which order and pieces, follows from the texts and the
sizes of matrices alone, and each piece is one thread's.

Shape suffixes:  M tokens    B windows of a batch    T tokens of a window    K texts    N experts    D hidden_size
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.calibrating.collect import ATTENTION, FFN, Batch, advanced, batches, counted, shares_input
from bam_merge.calibrating.corpus import Corpus
from bam_merge.calibrating.rows import rows
from bam_merge.calibrating.sums import Sums
from bam_merge.errors import NonFiniteError
from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block
from bam_merge.model.positions import Cache
from bam_merge.model.streaming import Computing, streamed_block
from bam_merge.values.tensors import rounded

TRIED = 1024
"""Tokens of each text that routers are tried on, where there are no further ones."""


@dataclass(frozen=True)
class Wanted:
    """One router that is to be made: tensor and parameter of the reference model that it is, and its text by source."""

    name: str
    parameter: str
    role: str
    layer: int
    method: expressions.Calibrator
    names: tuple[str, ...]
    corpus: Corpus
    inputs: str
    dtype: str

    @property
    def distinct(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names))


@dataclass(frozen=True)
class Made:
    """A router's rows [N, D], rounded to the dtype that they are stored in; and the share of tokens, and of windows by the sum of their
    tokens' logits, that it sends to the expert whose text they are of."""

    values: Tensor
    tokens: float
    windows: float


@dataclass
class State:
    """How far a pass has come: the routers of all layers before `layer`, and every batch's hidden states before it."""

    inputs: str
    layer: int
    made: dict[str, Made]
    hidden: list[Tensor]


@dataclass
class Watch:
    """`save` is given the state after each layer; `load` gives the last one of an earlier run of the same plan, or None. `progress` hears
    of tokens times layers done, and of all."""

    save: Callable[[State], None] = lambda state: None
    load: Callable[[], State | None] = lambda: None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class WithRouters(StoredModel):
    """A mixture whose routers are those that were made so far; zeros where one is yet to be made."""

    wanted: Mapping[str, Wanted] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        router = self._router(parameter)
        return super().read(parameter, dtype) if router is None else router.to(dtype)

    def read_rows(self, parameter: str, some: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        router = self._router(parameter)
        return super().read_rows(parameter, some, dtype) if router is None else router[list(some)].to(dtype)

    def _router(self, parameter: str) -> Tensor | None:
        wanted = self.wanted.get(parameter)
        if wanted is None:
            return None
        made = self.made.get(wanted.name)
        return torch.zeros(len(wanted.names), self.config.hidden_size) if made is None else made.values


Models = Mapping[str, Callable[[Mapping[str, Made]], StoredModel]]
"""Opens the model whose hidden states routers are made for, by `inputs`, given the routers that are made so far."""


@torch.no_grad()
def make_routers(wanted: Sequence[Wanted], models: Models, computing: Computing, watch: Watch) -> dict[str, Made]:
    """Every router that is wanted, by its tensor's name. Raises CheckpointError when the model cannot be read, NonFiniteError for rows that
    are no numbers of their dtype."""
    resumed = watch.load()
    made: dict[str, Made] = dict(resumed.made) if resumed else {}
    if all(router.name in made for router in wanted):
        return made
    passes = [inputs for inputs in ("seed", "mixture") if any(router.inputs == inputs for router in wanted)]
    for inputs in passes:
        if resumed is not None and passes.index(resumed.inputs) > passes.index(inputs):
            continue
        state = resumed if resumed is not None and resumed.inputs == inputs else None
        _Pass(inputs, [router for router in wanted if router.inputs == inputs], models[inputs](made), made, computing, watch).run(state)
    return made


class _Pass:
    """All routers of one kind of inputs."""

    def __init__(
        self, inputs: str, wanted: Sequence[Wanted], model: StoredModel, made: dict[str, Made], computing: Computing, watch: Watch
    ) -> None:
        self.inputs, self.wanted, self.model, self.made, self.computing, self.watch = inputs, wanted, model, made, computing, watch
        self.layers = 1 + max(router.layer for router in wanted)

    def run(self, state: State | None) -> None:
        found = batches([text for router in self.wanted for text in router.corpus.all], self.model, self.computing)
        first = 0
        if state is not None and [tuple(x.shape) for x in state.hidden] == [tuple(batch.x_BTD.shape) for batch in found]:
            first = state.layer
            for batch in found:
                batch.x_BTD = self.computing.taken(state.hidden.pop(0))  # not held twice
        tokens = sum(batch.tokens for batch in found)
        for layer in range(first, self.layers):
            block = streamed_block(self.model, layer, self.computing)
            asked = [router for router in self.wanted if router.layer == layer]
            (self._of_seed if self.inputs == "seed" else self._of_mixture)(block, asked, found)
            self.watch.progress((layer + 1) * tokens, self.layers * tokens)
            self.watch.save(State(self.inputs, layer + 1, self.made, [batch.x_BTD for batch in found]))

    def _of_seed(self, block: Block, asked: Sequence[Wanted], found: Sequence[Batch]) -> None:
        """Inputs of both routers from one pass."""
        collected = _Collected(asked, block, self.computing)
        for batch in found:
            batch.x_BTD, seen = advanced(block, batch)
            for role in collected.roles:
                collected.take(role, batch, seen[role])
        self.made.update(collected.routers())

    def _of_mixture(self, block: Block, asked: Sequence[Wanted], found: Sequence[Batch]) -> None:
        """The attention's router first: it decides what the FFN's sees."""
        before = asked if block.parallel else [router for router in asked if router.role == ATTENTION]
        for routers in (before, [router for router in asked if router not in before]):
            if routers:
                collected = _Collected(routers, block, self.computing)
                for batch in found:
                    for role in collected.roles:
                        collected.take(role, batch, _input(block, role, batch))
                self.made.update(collected.routers())
        for batch in found:
            batch.x_BTD, _ = advanced(block, batch)


def _input(block: Block, role: str, batch: Batch) -> Tensor:
    """What a router sees [B, T, D], without running what it chooses from."""
    x_BTD = batch.x_BTD
    if role == ATTENTION or block.post_attention_layernorm is None:
        return cast(Tensor, block.input_layernorm(x_BTD))
    if not block.parallel:
        positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None].expand(x_BTD.shape[:2])
        attention_BTD = block.self_attn(block.input_layernorm(x_BTD), positions_BT, Cache(), None)[0]
        x_BTD = x_BTD + block.scale * block.post_self_attn_layernorm(attention_BTD)
    return cast(Tensor, block.post_attention_layernorm(x_BTD))


@dataclass
class _Site:
    """What is collected for routers with the same inputs, texts and rule, scale apart."""

    role: str
    method: expressions.Calibrator
    corpus: Corpus
    sums: Sums
    negative: Sums | None
    tried: list[tuple[str, Tensor]] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    unit_KD: Tensor | None = None


class _Collected:
    """The inputs of some routers of one block: one set of sums for those that have everything but the scale in common."""

    def __init__(self, wanted: Sequence[Wanted], block: Block, computing: Computing) -> None:
        self.computing = computing.in_float64()
        self.one = ATTENTION if shares_input(block) else None
        self.sites: dict[tuple[Any, ...], _Site] = {}
        self.wanted = wanted
        self.of = {router.name: self._site(router, block) for router in wanted}
        self.roles = tuple(dict.fromkeys(site.role for site in self.sites.values()))

    def _site(self, router: Wanted, block: Block) -> _Site:
        role = self.one or router.role
        method = replace(cast(Any, router.method), scale=1.0)
        key = role, method, id(router.corpus)
        if key not in self.sites:
            width = block.self_attn.config.hidden_size
            texts, negative = router.corpus.texts, router.corpus.negative
            moments = isinstance(method, expressions.Ridge)

            def sums(tokens: list[int], moments: bool) -> Sums:
                return Sums(tokens, width, moments, self.computing.pool, self.computing.device)

            self.sites[key] = _Site(
                role, method, router.corpus, sums([texts[name].counted for name in router.distinct], moments),
                sums([text.counted for text in negative.values()], False) if negative else None,
            )  # fmt: skip
        return self.sites[key]

    def take(self, role: str, batch: Batch, x_BTD: Tensor) -> None:
        """The inputs of a batch, for all sites that have its text."""
        for site in self.sites.values():
            if site.role == role:
                self._take(site, batch, x_BTD)

    def _take(self, site: _Site, batch: Batch, x_BTD: Tensor) -> None:
        names = self._names(site)
        wide_MD: Tensor | None = None
        for index, name in enumerate(names):
            text = site.corpus.texts[name]
            if text.digest != batch.text:
                continue
            if not batch.further:
                wide_MD = self.computing.taken(counted(x_BTD)) if wide_MD is None else wide_MD
                site.sums.add(index, wide_MD)
            if windows := self._tries(site, name, batch):
                site.tried.append((name, x_BTD[:windows, 1:].cpu()))
        for index, text in enumerate(site.corpus.negative.values()):
            if site.negative is not None and text.digest == batch.text and not batch.further:
                site.negative.add(index, self.computing.taken(counted(x_BTD)))

    def _names(self, site: _Site) -> tuple[str, ...]:
        return next(router.distinct for router in self.wanted if self.of[router.name] is site)

    def _tries(self, site: _Site, name: str, batch: Batch) -> int:
        """On how many windows of a batch the routers are to be tried: on tokens that they are not made of, where every text has some."""
        if all(text.further for text in site.corpus.texts.values()):
            return len(batch.windows) if batch.further else 0
        kept, length = site.kept.get(name, 0), batch.x_BTD.shape[1]
        windows = 0 if batch.further else min(len(batch.windows), max(0, -((kept - TRIED) // length)))
        site.kept[name] = kept + windows * length
        return windows

    def routers(self) -> dict[str, Made]:
        """Every router, made and tried."""
        return {router.name: self._made(router, self.of[router.name]) for router in self.wanted}

    def _made(self, router: Wanted, site: _Site) -> Made:
        if site.unit_KD is None:
            site.unit_KD = rows(site.method, site.sums, self._negative(site)).cpu()
        distinct = router.distinct
        rows_ND = cast(Any, router.method).scale * site.unit_KD[[distinct.index(name) for name in router.names]]
        values_ND = rounded(rows_ND, router.dtype)
        if not bool(torch.isfinite(values_ND.float()).all()):
            what = f"{float(rows_ND.abs().max()):.3g}" if bool(torch.isfinite(rows_ND).all()) else "NaN or infinity"
            raise NonFiniteError(
                f"{router.name}: its rows hold {what}, which {router.dtype} does not. Use a smaller router.scale, or a wider output.dtype."
            )
        right, tokens, texts = 0, 0, 0
        for name, x_BTD in site.tried:
            logits_BTN = x_BTD.float() @ values_ND.float().T
            wanted = distinct.index(name)
            chosen = torch.tensor([distinct.index(source) for source in router.names])
            right += int((chosen[logits_BTN.argmax(-1)] == wanted).sum())
            texts += int((chosen[logits_BTN.sum(1).argmax(-1)] == wanted).sum())
            tokens += logits_BTN.shape[0] * logits_BTN.shape[1]
        windows = sum(len(x_BTD) for _, x_BTD in site.tried)
        return Made(values_ND, right / max(1, tokens), texts / max(1, windows))

    def _negative(self, site: _Site) -> Tensor | None:
        """Means of what is not typical of a text [K, D], zero where nothing is."""
        if site.negative is None:
            return None
        means_KD = torch.zeros_like(site.sums.total_KD)
        for index, name in enumerate(site.corpus.negative):
            means_KD[self._names(site).index(name)] = site.negative.means[index]
        return means_KD


__all__ = ["ATTENTION", "FFN", "Made", "Models", "State", "Wanted", "Watch", "WithRouters", "make_routers"]
