"""The mixture by itself: are its numbers finite, and does no token see what it should not?"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block, BlockOutput
from bam_merge.model.positions import Cache
from bam_merge.model.routes import choices, routed, router_logits
from bam_merge.model.streaming import Computing, streamed_block, streamed_embeddings, streamed_head
from bam_merge.text import some
from bam_merge.verifying.decodable import decodable, first_part, scalings_by_length
from bam_merge.verifying.levels import layers_asked
from bam_merge.verifying.measuring import Way, Worst, difference, of_layers
from bam_merge.verifying.report import Check, Report

DEGENERATE_SHARE = 0.9
"""A router that sends this share of tokens to one expert is named."""


@torch.no_grad()
def as_it_is(mixture: StoredModel, ids_BT: Tensor, report: Report, sample: str, way: Way) -> Iterator[Check]:
    """Finite logits; no token sees a later one, another sequence of the batch, or padding; cached decoding is the full forward.

    Where float32 leaves a doubt, float64 decides: rounding can send a token to another expert. Not whether logits are finite: engines
    compute in no more than float32.
    """
    finite: list[Check] = []
    computing = way.computing
    for computing in (way.computing, way.computing.in_float64()):
        checks, routing = _Probes(mixture, ids_BT, computing, way).run()
        finite.append(checks[0])
        if all(check.ok is not False for check in checks) and not way.level.thorough:
            break
    report.routing += routing
    yield finite[0]
    yield from checks[1:]
    yield _router_check(routing, sample)


PADDING = 2
"""Padding tokens before the sequence that is padded."""


class _Probes:
    """The batch, a batch with its last third changed, and the first sequence padded on the left go through all blocks: together, as one
    batch, or each by itself (`apart`). In the layers that are asked, the block also computes the batch's first sequence alone, and the
    batch, or as much of it as a cache can decode, in two cached parts.
    """

    def __init__(self, mixture: StoredModel, ids_BT: Tensor, computing: Computing, way: Way) -> None:
        self.mixture, self.computing, self.way = mixture, computing, way
        T = ids_BT.shape[1]
        self.cut, self.span = first_part(T), decodable(mixture.config, T)
        later_BT = ids_BT.clone()
        later_BT[:, self.cut :] = (later_BT[:, self.cut :] + 1) % mixture.config.vocab_size
        self.apart = way.level.thorough or self.span < T  # where frequencies depend on the length, only one of the same length compares
        kept = T if self.apart else T - PADDING
        left_BT = torch.cat((torch.zeros_like(ids_BT[:1, :PADDING]), ids_BT[:1, :kept]), 1)
        positions_1T, left = torch.arange(T)[None], torch.arange(-PADDING, kept)[None].clamp(min=-1)
        whole = positions_1T.expand_as(ids_BT)
        later_BT = later_BT if way.level.thorough else later_BT[:1]
        together = [(ids_BT, whole), (later_BT, whole[: len(later_BT)]), (left_BT, left)]
        self.rows = [len(ids) for ids, _ in together]
        self.positions = [positions.to(computing.device) for _, positions in together]
        self.x = [streamed_embeddings(mixture, ids, computing) for ids, _ in together]
        self.worst = {name: _ten_times(name) for name in ("cached decoding", "batch")}
        self.routing: list[dict[str, Any]] = []

    def run(self) -> tuple[list[Check], list[dict[str, Any]]]:
        """The checks, finite logits first, and what every router did."""
        asked = layers_asked(self.mixture.config, self.way.level)
        for layer in range(self.mixture.config.num_hidden_layers):
            block = streamed_block(self.mixture, layer, self.computing)
            x_BTD = self.x[0]
            self._advance(block, layer)
            if layer in asked:
                self._ask(block, layer, x_BTD, self.x[0])
            self.way.ran(layer)
        return list(self._checks(asked)), self.routing

    def _advance(self, block: Block, layer: int) -> None:
        """Every probe's hidden states after the block."""
        if self.apart:
            outs = []
            for index, (x_BTD, positions) in enumerate(zip(self.x, self.positions, strict=True)):
                with router_logits(block) as logits_of:
                    outs.append(block(x_BTD, positions))
                if index == 0:
                    self._note(layer, outs[0], logits_of)
            self.x = [out.hidden for out in outs]
        else:
            with router_logits(block) as logits_of:
                out = block(torch.cat(self.x), torch.cat(self.positions))
            self._note(layer, out, logits_of)
            self.x = list(out.hidden.split(self.rows))

    def _note(self, layer: int, out: BlockOutput, logits_of: Mapping[str, Tensor]) -> None:
        """What the routers did with the batch, whose rows come first."""
        rows = self.rows[0]
        for router, (gates_BTN, logits_BTN) in routed(out, logits_of).items():
            found = choices(layer, router, gates_BTN[:rows].cpu(), logits_BTN[:rows].cpu())
            self.routing.append(
                {"layer": layer, "router": router, "entropy": found.entropy, "gate": [*found.gate], "share": [*found.share]}
            )

    def _ask(self, block: Block, layer: int, x_BTD: Tensor, out_BTD: Tensor) -> None:
        """The same hidden states by other ways through the block."""
        positions, span = self.positions[0], self.span
        self._compare("batch", layer, block(x_BTD[:1], positions[:1]).hidden, x_BTD[:1], out_BTD[:1])
        if span:
            cache, first = Cache(), first_part(span)
            parts = [block(x_BTD[:, a:b], positions[:, a:b], cache).hidden for a, b in ((0, first), (first, span))]
            expected = out_BTD if span == x_BTD.shape[1] else block(x_BTD[:, :span], positions[:, :span]).hidden
            self._compare("cached decoding", layer, torch.cat(parts, 1), x_BTD[:, :span], expected)

    def _compare(self, name: str, layer: int, got: Tensor, x_BTD: Tensor, expected: Tensor) -> None:
        self.worst[name].add(difference(got - x_BTD, expected - x_BTD, expected), f"layer {layer}")

    def _checks(self, asked: Collection[int]) -> Iterator[Check]:
        whole, later, left = (streamed_head(self.mixture, x_BTD, self.computing) for x_BTD in self.x)
        bad = int((~torch.isfinite(whole)).sum())
        yield Check("finite logits", bad == 0, f"{bad} of {whole.numel()} logits are NaN or infinite" if bad else "", float(bad), 0.0)
        yield _same("causality", later[:, : self.cut], whole[: len(later), : self.cut], "a later token changes nothing before it")
        kinds = dict.fromkeys(rope["rope_type"] for rope in scalings_by_length(self.mixture.config))
        scaled = f"{' and '.join(kinds)} scaling changes the frequencies of longer sequences"
        of = of_layers(asked, self.mixture.config.num_hidden_layers)
        if self.span:
            passed = "equals the full forward" + (f" of {self.span} tokens ({scaled})" if self.span < whole.shape[1] else "")
            yield self.worst["cached decoding"].check(passed + of)
        else:
            yield Check("cached decoding", None, f"not run: {scaled} from the second token on")
        yield self.worst["batch"].check(f"a sequence computes the same alone and in a batch{of}")
        yield _same("padding", left[:, PADDING:], whole[:1, : left.shape[1] - PADDING], "padding on the left changes nothing")


def _ten_times(name: str) -> Worst:
    """What went through all layers, or through a layer by another way, may be further off than what one layer computes."""
    worst = Worst(name)
    worst.tolerance *= 10
    return worst


def _same(name: str, got: Tensor, expected: Tensor, passed: str) -> Check:
    worst = _ten_times(name)
    worst.add(difference(got, expected), "logits")
    return worst.check(passed)


def _router_check(routing: list[dict[str, Any]], sample: str) -> Check:
    """A router that sends nearly everything to one expert is named; that is a finding, not a failure: training may mend it."""
    names = [
        f"layer {row['layer']} {row['router']} (expert {row['share'].index(max(row['share']))}: {max(row['share']):.0%})"
        for row in routing
        if max(row["share"]) >= DEGENERATE_SHARE
    ]
    detail = f"degenerate: {some(names, 6)}" if names else "none sends nearly all tokens to one expert"
    return Check("router load", True, f"on {sample}: {detail}", max((max(row["share"]) for row in routing), default=0.0), None)
