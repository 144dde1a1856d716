"""What every family goes through, generated from its table: a family that is added is tried by being there.

Each word of a table that a config.json can switch is switched and compared with transformers, dense and as a mixture; every kind of merge
of every variant is saved by transformers and is the same again; every layout that can take a family is run by transformers' class of it;
and what is unusual about a family is taken away, or misread, and must be missed. `make test` has one of each for each family,
`make test-families` all of them.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, NO_CLASS, SOURCES, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed
from test_exported import KINDS, assert_same_tensors, exact
from test_exported import load as exported
from test_model import TOLERANCE, build, distance, ids, theirs, write_dense, write_three

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import applies, in_order
from bam_merge.architectures.tables import dense_families, load_architecture, mixture_layouts
from bam_merge.architectures.vocabulary import LINEAR_SIZES, QUIET, SYMBOLS, UNSAID
from bam_merge.errors import BamMergeError
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.sources import dense
from bam_merge.verifying.verification import verify

transformers = pytest.importorskip("transformers")

OWN = [name for name, config in CONFIGS.items() if config["model_type"] not in NO_CLASS]
FIRST = {CONFIGS[name]["model_type"]: name for name in reversed(OWN)}
"""The first variant of every family that transformers has a class of, by its model type."""


@dataclass(frozen=True)
class Change:
    """Keys that a variant has otherwise than the family's first one, and what of it must come out in the facts."""

    name: str
    keys: dict[str, Any]
    facts: dict[str, Any]


BESIDES = {("phi", "qk_layernorm"): {"head_dim": 8}}
"""What has to be said with a key: transformers' norms of Phi's q and k have hidden_size / num_attention_heads weights, whatever head_dim is."""


def changes(family: str) -> Iterator[Change]:
    """Everything that a config.json of the family can switch, by its table, one at a time."""
    table, config = load_architecture(family), CONFIGS[FIRST[family]]
    facts, problems = describe(table, config, []), list[str]()
    tied = not facts["tie_word_embeddings"]
    yield Change("tied" if tied else "untied", {"tie_word_embeddings": tied}, {"tie_word_embeddings": tied})
    for key, default in table.defaults.items():
        if type(default) is bool and key not in (*table.quirks.only, "tie_word_embeddings", "use_sliding_window"):
            value = not config.get(key, default)
            yield Change(f"{key} {str(value).lower()}", {key: value, **BESIDES.get((family, key), {})}, {})
    for trait, value in table.traits.items():
        key = str(value).partition(":")[2].partition("^")[0]
        if key and key not in (*SYMBOLS.values(), *table.quirks.only) and type(table.defaults.get(key)) is not bool:
            number = 3 if type(table.defaults.get(key)) is int else 0.375
            yield Change(f"{key} {number}", {key: number}, {trait: facts_with(table.name, {**config, key: number})[trait]})
    own = vars(transformers.AutoConfig.for_model(config["model_type"]))
    if "num_key_value_heads" in own and "num_key_value_heads" not in table.quirks.worked_out:
        for count in {1, 2, 4} - {facts["num_key_value_heads"]}:
            yield Change(
                f"{count} of 4 heads for keys", {"num_attention_heads": 4, "num_key_value_heads": count}, {"num_key_value_heads": count}
            )
    if "head_dim" not in table.quirks.worked_out and describe(table, {**config, "head_dim": 16}, []):  # which not every family can say
        yield Change("wider heads", {"head_dim": 16}, {"head_dim": 16})
    eps = table.quirks.norm_eps or next((key for key in table.function if key.endswith(("norm_eps", "epsilon"))), None)
    if eps and eps not in table.quirks.only:
        yield Change("large epsilon", {eps: 0.05}, {})
    assert problems == []


def facts_with(family: str, config: dict[str, Any]) -> dict[str, Any]:
    problems: list[str] = []
    facts = describe(load_architecture(family), config, problems)
    assert problems == []
    return facts


CHANGES = {(family.name, change.name): change for family in dense_families() if family.name in FIRST for change in changes(family.name)}

NOT_BUILT = {("helium", "wider heads")}
"""What transformers' own class cannot be built with."""


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_what_a_config_can_switch_is_computed_as_transformers_does(family: str, change: str, tmp_path: Path) -> None:
    switched = CHANGES[family, change]
    config = {**CONFIGS[FIRST[family]], **switched.keys}
    facts = facts_with(family, config)
    assert {key: facts[key] for key in switched.facts} == switched.facts
    folder = write_dense(tmp_path, config)
    if (family, change) in NOT_BUILT:
        with pytest.raises(Exception, match="ignore_mismatched_sizes"):
            theirs(folder)
        return
    with torch.no_grad():
        expected = theirs(folder)(input_ids=ids()).logits
        assert float(expected.std()) > 0.1
        assert distance(load_model(folder)(ids()), expected) < TOLERANCE


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_what_a_config_can_switch_is_merged_proved_and_exported(family: str, change: str, tmp_path: Path) -> None:
    """Three models without anything in common: every expert is its own, and the exported model what the reference model is."""
    write_three(tmp_path, {**CONFIGS[FIRST[family]], **CHANGES[family, change].keys})
    folder = build(tmp_path, "ffn: {top_k: 2, gate: topk_then_softmax}")
    report = verify(folder)
    assert report.ok, failed(report)
    assert {"expert isolation", "identity"} <= {check.name for check in report.checks}
    model = exported(folder)
    with torch.no_grad():
        expected = load_model(folder)(ids())
        assert float(expected.std()) > 0.1
        assert distance(model(ids()).logits, expected) < TOLERANCE * float(expected.abs().max())  # rounding is in proportion
        assert distance(exact(model)(ids()).logits, load_model(folder, torch.float64)(ids())) < 1e-12


def test_a_family_can_be_switched_in_more_than_one_way() -> None:
    """The table above is made from the tables: it must not be empty for any family by accident."""
    for family in FIRST:
        own = [change for other, change in CHANGES if other == family]
        assert len(own) >= 3, family
        assert {"tied", "untied"} & set(own), family
    assert {family for family, change in CHANGES if change == "wider heads"} >= {"llama", "qwen2", "gemma", "granite", "cohere2"}


# ---- what transformers makes of a result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_gives_the_same_bytes_back(name: str, kind: str, tmp_path: Path) -> None:
    """Of every family and kind of mixture: save_pretrained writes what was loaded, one tensor per expert, under the same names."""
    method, text = KINDS[kind]
    write_three(tmp_path, CONFIGS[name])
    folder = build(tmp_path, text, method)
    exported(folder).save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_a_dense_merge_is_transformers_own_model_with_the_mean(name: str, tmp_path: Path) -> None:
    """Its class loads the folder whole, and computes what it computes with the mean of the three state dicts."""
    write_three(tmp_path, CONFIGS[name])
    folder = publish(plan_file(write_recipe(tmp_path, method="merge")), None, UNPROVED)
    merged = theirs(folder)
    models = [theirs(tmp_path / source) for source in SOURCES]
    seeds = [key for key in models[0].state_dict() if key.endswith(("A_log", "dt_bias"))]
    mean = {key: sum(model.state_dict()[key].double() for model in models) / 3 for key in models[0].state_dict() if key not in seeds}
    mean |= {key: models[0].state_dict()[key] for key in seeds}
    models[0].load_state_dict({key: value.to(models[0].state_dict()[key].dtype) for key, value in mean.items()})
    expected = models[0](input_ids=ids()).logits
    assert type(merged) is type(models[0])
    assert float(expected.std()) > 1e-3
    assert distance(merged(input_ids=ids()).logits, expected) < TOLERANCE
    assert distance(load_model(folder)(ids()), expected) < TOLERANCE


LAYOUTS = [layout.name for layout in mixture_layouts() if layout.name != "bam"]


def gate_of(layout: str) -> str:
    """Gates that sum to one, of the kind that a layout has."""
    return "topk_then_sigmoid" if load_architecture(layout).accepts.get("scoring_func") == "sigmoid" else "topk_then_softmax"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_layout_that_takes_a_family_computes_the_mixture(name: str, layout: str, tmp_path: Path) -> None:
    """Either the plan refuses it and names what the layout has no word for, or transformers' class of the layout runs the same function."""
    write_three(tmp_path, CONFIGS[name])
    sections = f"ffn: {{top_k: 2, gate: {gate_of(layout)}}}\nrouter: {{init: normal, std: 0.5}}"
    recipe = write_recipe(tmp_path, sections, "btx", output=f"{{path: out, layout: {layout}}}")
    try:
        plan = plan_file(recipe)
    except BamMergeError as error:
        needed = [problem for problem in error.problems if f"output.layout: {layout} needs " in problem]
        assert needed
        assert all("Use layout: bam" in problem for problem in needed)
        return
    folder = publish(plan, None, UNPROVED)
    other, model = theirs(folder), load_model(folder)
    assert other.config.model_type in load_architecture(layout).model_types
    expected = other(input_ids=ids()).logits
    assert float(expected.std()) > 0.05
    assert distance(model(ids()), expected) < TOLERANCE
    report = verify(folder, plan)
    assert report.ok, failed(report)


def plainest(family: str) -> dict[str, Any]:
    """The family's first variant with every factor at what is none, and no layer that slides."""
    table, config = load_architecture(family), CONFIGS[FIRST[family]]
    facts, plain = describe(table, config, []), {"layer_types": ["full_attention"] * 2} if table.quirks.windows != "none" else {}
    plain |= {"sliding_window": None} if table.quirks.windows == "all" else {}  # which all layers have, or none
    if "partial_rotary_factor" in table.defaults:
        plain["rope_parameters"] = {**facts["rope_parameters"], "partial_rotary_factor": 1.0}
    for trait, value in table.traits.items():
        key, _, power = str(value).partition(":")[2].partition("^")
        if key and type(table.defaults.get(key)) is bool:
            plain[key] = UNSAID[trait]
        elif key and key not in SYMBOLS.values():
            number = facts["head_dim"] ** (-0.5 / float(power or 1)) if trait == "attention_scale" else 1.0
            plain[key] = round(number) if type(table.defaults.get(key)) is int else number
    return {key: value for key, value in {**config, **plain}.items() if key not in table.quirks.renamed}


@pytest.mark.parametrize("family", FIRST)
def test_the_reference_says_which_layouts_take_a_family(family: str, tmp_path: Path) -> None:
    """Those that a variant of it, or of what its config can switch, can be planned in; the others refuse all of them."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| [{family}](#{family}) |"))
    variants = [config for config in CONFIGS.values() if config["model_type"] == family]
    variants += [{**CONFIGS[FIRST[family]], **change.keys} for (of, _), change in CHANGES.items() if of == family]
    taken = set()
    for config in (*variants, plainest(family)):
        write_sources(tmp_path, config)
        for layout in (*LAYOUTS, "bam"):
            with suppress(BamMergeError):
                gate = f"ffn: {{gate: {gate_of(layout)}}}"
                plan_file(write_recipe(tmp_path, gate, "btx", output=f"{{path: out, layout: {layout}}}"))
                taken.add(layout)
    assert taken == {word for word in (*LAYOUTS, "bam") if f"`{word}`" in line.split(" | ")[2]}


# ---- what is unusual is missed ------------------------------------------------------------------------------------------------------

SHOWN = {
    "norm_type", "norm_bias", "parallel_block", "parallel_norms", "gated_ffn", "qk_norm", "head_bias", "attention_bias", "attention_out_bias", "mlp_bias",
    "pre_norms", "post_norms", "qk_norm_shape", "qk_norm_bias", "norm_weights", "attention_gate", *LINEAR_SIZES, "layer_scale", "values_are_keys", "sizes_by_kind",
}  # fmt: skip
"""Facts that say which tensors there are."""

MISREAD = [fact for fact in {**UNSAID, **QUIET} if fact not in SHOWN]
"""Facts that no tensor shows: a wrong one could only be seen in what is computed."""


def unusual(name: str) -> list[str]:
    facts = describe(load_architecture(CONFIGS[name]["model_type"]), CONFIGS[name], [])
    return [fact for fact in MISREAD if facts.get(fact) != {**UNSAID, **QUIET}[fact]]


UNUSUAL = [(name, fact) for name in CONFIGS for fact in unusual(name)]


@pytest.mark.parametrize(("name", "fact"), UNUSUAL)
def test_what_is_unusual_cannot_be_misread(name: str, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that read the family as if it had not this: verification reads the config.json on its own, and says which fact differs."""
    write_sources(tmp_path, CONFIGS[name])
    right = describe
    monkeypatch.setattr(dense, "describe", lambda *args: {**right(*args), fact: {**UNSAID, **QUIET}[fact]})
    plan = plan_file(write_recipe(tmp_path))
    found = failed(verify(publish(plan, None, UNPROVED), plan))
    assert found
    assert {"source configs", "head"} & set(found), found


@pytest.mark.parametrize(("name", "fact"), UNUSUAL)
def test_what_is_unusual_cannot_be_left_out_of_a_result(name: str, fact: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    assert verify(folder, plan).ok
    Forger(folder).config(**{fact: {**UNSAID, **QUIET}[fact]})
    assert fact in failed(verify(folder, plan))["config"]


def own_tensors(name: str) -> list[str]:
    """The tensors that an expert of a layer has in a mixture of this variant, as they are called after the expert's number."""
    table = load_architecture(CONFIGS[name]["model_type"])
    facts = describe(table, CONFIGS[name], [])
    roles = {role for cell in in_order(table, 2) if applies(cell, facts) for role in cell.row.roles}
    rows = [row for row in load_architecture("bam").rows if row.per_expert and row.roles[0] in roles]
    return [row.names[0].removeprefix("model.layers.{layer}.") for row in rows]


def layer_with(plan: Plan, tensor: str) -> int:
    """The last layer of a mixture whose experts have the tensor."""
    return max(step.layer for step in plan.steps if step.name == f"model.layers.{step.layer}.{tensor.replace('{expert}', '0')}")


@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name in CONFIGS for tensor in own_tensors(name)])
def test_two_experts_swapped_in_one_tensor_are_found(name: str, tensor: str, tmp_path: Path) -> None:
    """Every tensor that an expert has, with digests that fit: by its bytes, and where it changes what is computed, by that too."""
    for seed, source in enumerate(SOURCES):
        write_dense(tmp_path / source, CONFIGS[name], seed)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    assert verify(folder, plan).ok
    layer = layer_with(plan, tensor)
    first, second = (f"model.layers.{layer}.{tensor}".replace("{expert}", str(expert)) for expert in (0, 1))
    Forger(folder).swap(first, second)
    found = failed(verify(folder, plan))
    assert first in found["copies"]
    assert second in found["copies"]
    if not tensor.endswith("k_proj.bias"):  # which the softmax all but cancels
        assert f"layer {layer}, expert 0 (seed): {'FFN' if tensor.startswith('mlp') else 'attention'}" in found["expert isolation"]


def test_the_facts_above_are_those_of_the_tables() -> None:
    assert {"norm_offset", "attention_scale", "rope_layers", "query_growth", "rope_interleaved", "logit_scale"} <= set(MISREAD)
    assert {"granite", "gemma", "smollm3", "cohere", "ministral3"} <= {CONFIGS[name]["model_type"] for name, _ in UNUSUAL}
