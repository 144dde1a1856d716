"""What is wrong in one layer of many is found by the quick level, whether its blocks are run there or not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe, write_sources
from proofs import SQUARE, UNPROVED, Forger, failed

from bam_merge.model import model as reference
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.levels import LEVELS, layers_asked
from bam_merge.verifying.options import VerifyOptions
from bam_merge.verifying.verification import verify

LAYERS = 7
ASKED, NOT_ASKED = 3, 1


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, Plan]:
    write_sources(tmp_path, {**SQUARE, "num_hidden_layers": LAYERS})
    plan = plan_file(write_recipe(tmp_path))
    return publish(plan, None, UNPROVED), plan


def part(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}.weight"


def swap_k(forge: Forger, layer: int) -> None:
    forge.swap(part(layer, "self_attn.experts.0.k_proj"), part(layer, "self_attn.experts.1.k_proj"))


def change(rest: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Forger, int], None]:
    def changed(forge: Forger, layer: int) -> None:
        before = forge.read(part(layer, rest))
        after = how(before)
        assert not torch.equal(before, after)
        forge.write(part(layer, rest), after)

    return changed


def zeroed_column(weight: torch.Tensor) -> torch.Tensor:
    return weight.index_fill(1, torch.tensor([3]), 0.0)


def other_row(weight: torch.Tensor) -> torch.Tensor:
    return weight.index_copy(0, torch.tensor([1]), weight[1:2].flip(1))


FAULTS: dict[str, tuple[Callable[[Forger, int], None], dict[str, str]]] = {
    "two experts' k_proj swapped": (swap_k, {"copies": "experts.0.k_proj", "expert isolation": "layer {0}, expert 0 (seed): attention (k_proj.weight), layer {0}, expert 1 (code): attention (k_proj.weight)"}),
    "a scale of 1.01 on one o_proj": (change("self_attn.experts.1.o_proj", lambda w: w * 1.01), {"copies": "experts.1.o_proj", "expert isolation": "layer {0}, expert 1 (code): attention (o_proj.weight)"}),
    "one row of one router": (change("mlp.router", other_row), {"routers": "model.layers.{0}.mlp.router.weight"}),
    "one zeroed column of a down_proj": (change("mlp.experts.2.down_proj", zeroed_column), {"copies": "experts.2.down_proj", "expert isolation": "layer {0}, expert 2 (law): FFN (down_proj.weight)"}),
    "the gates' order permuted": (change("self_attn.router", lambda w: w.roll(1, 0)), {"routers": "model.layers.{0}.self_attn.router.weight"}),
}  # fmt: skip


def test_three_layers_answer_for_seven_alike(deep: tuple[Path, Plan]) -> None:
    config = reference.ModelConfig.from_dict({**deep[1].config})
    assert layers_asked(config, LEVELS["quick"]) == {0, ASKED, 6}
    assert layers_asked(config, LEVELS["full"]) == set(range(LAYERS))


def test_every_kind_of_layer_answers_for_itself() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads_per_expert": 1}
    sizes |= {"num_key_value_heads_per_expert": 1, "head_dim": 8, "num_hidden_layers": 8}
    types = ["sliding_attention", "full_attention"] * 4
    config = reference.ModelConfig.from_dict({**sizes, "layer_types": types, "shared_kv_layers": [4]})
    assert layers_asked(config, LEVELS["quick"]) == {4, 0, 2, 6, 1, 5, 7}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layer", [ASKED, NOT_ASKED])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_layer_is_found_there(name: str, layer: int, level: str, deep: tuple[Path, Plan]) -> None:
    """And nowhere else."""
    folder, plan = deep
    fault, expected = FAULTS[name]
    fault(Forger(folder), layer)
    found = failed(verify(folder, plan, options=VerifyOptions(level)))
    for check, words in expected.items():
        assert words.format(layer) in found[check], found
    places = found.get("expert isolation", "")
    assert not any(f"layer {other}," in places for other in range(LAYERS) if other != layer)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layer", [ASKED, NOT_ASKED])
def test_a_rotary_table_of_another_theta_in_one_layer(
    layer: int, level: str, deep: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file can say so; code can."""
    folder, plan = deep
    real = reference.Attention.__init__

    def made(self: Any, config: reference.ModelConfig, index: int) -> None:
        real(self, config, index)
        if index == layer and config.num_attention_experts:
            self.config = replace(config, rope_parameters={**config.rope_parameters, "rope_theta": 500.0})

    monkeypatch.setattr(reference.Attention, "__init__", made)
    found = failed(verify(folder, plan, options=VerifyOptions(level)))
    assert set(found) == {"expert isolation"} if layer == NOT_ASKED and level == "quick" else {"expert isolation", "identity"}
    for j, source in enumerate(("seed", "code", "law")):
        assert (
            f"layer {layer}, expert {j} ({source}): the block's configuration or wiring (self_attn.config: rotary frequencies)"
            in (found["expert isolation"])
        )


@pytest.mark.parametrize("level", LEVELS)
def test_a_good_one_passes(level: str, deep: tuple[Path, Plan]) -> None:
    folder, plan = deep
    report = verify(folder, plan, options=VerifyOptions(level))
    assert report.ok and report.level == level, failed(report)
    detail = {check.name: check.detail for check in report.checks}
    for name in ("expert isolation", "identity", "cached decoding", "batch"):
        assert ("(layers 0,3,6)" in detail[name]) == (level == "quick")
    assert len({row["layer"] for row in report.routing}) == LAYERS


def test_a_level_that_there_is_not(deep: tuple[Path, Plan]) -> None:
    from bam_merge.errors import VerifyError

    with pytest.raises(VerifyError, match="level 'fast' is none of quick, full"):
        verify(deep[0], options=VerifyOptions("fast"))
