"""The plan's reading of names and the reference model's, which share no code, over names that programs could have made."""

from typing import Any

import pytest
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors
from bam_merge.architectures.naming import find_naming
from bam_merge.architectures.tables import load_architecture, names_of_the_head
from bam_merge.architectures.wrappers import Wrapper, find_wrapper
from bam_merge.errors import CheckpointError
from bam_merge.model.wrapped import own_names

OUTER = st.lists(
    st.sampled_from(["module.", "_orig_mod.", "base_model.model.", "model.", "policy.", "_fsdp_wrapped_module.", "actor.llm."]), max_size=3
)
INNER = st.sampled_from([None, "_orig_mod", "_fsdp_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"])
BESIDE = [
    "vision_tower.layers.0.self_attn.q_proj.weight",
    "vision_tower.embeddings.weight",
    "model.vision_tower.norm.weight",
    "multi_modal_projector.linear.bias",
]


def own(config: dict[str, Any]) -> list[str]:
    family = load_architecture(config["model_type"])
    return [name for name, _ in family_tensors(family, describe(family, config, []))]


def both(stored: list[str], config: dict[str, Any], wrapper: Wrapper | None) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """The family's own name of each stored tensor by either reading; None where it refuses or leaves one unexplained."""
    family, names = load_architecture(config["model_type"]), own(config)
    naming = find_naming(stored, family, wrapper)
    first = None if naming.problem or naming.others or set(naming.names) != set(names) else dict(naming.names)
    heads = names_of_the_head(family)
    try:
        second = own_names(stored, ((name,) for name in names if name not in heads), heads, wrapper)
    except CheckpointError:
        return first, None
    return first, second if set(second) == set(names) else None


def spelled(name: str, form: str, base: str) -> str:
    match form:
        case "no base":
            return name.removeprefix(base)
        case "old wrapper":
            return f"language_model.{name}"
        case "new wrapper":
            return name.replace(base, f"{base}language_model.", 1) if name.startswith(base) else name
    return name


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), OUTER, INNER, st.sampled_from(["plain", "no base", "old wrapper", "new wrapper"]))
def test_one_prefix(config: str, outer: list[str], inner: str | None, form: str) -> None:
    """Whatever stands before and inside, both find the family's names."""
    base = "gpt_neox." if config.startswith("gpt_neox") else "model."
    expected = {}
    for name in own(CONFIGS[config]):
        text = spelled(name, form, base)
        for part in (".self_attn.", ".attention.", ".mlp."):
            text = text.replace(part, f".{inner}{part}") if inner else text
        expected[name] = "".join(outer) + text
    assert both(list(expected.values()), CONFIGS[config], None) == (expected, expected)


@settings(max_examples=60, deadline=None)
@given(
    OUTER,
    st.sampled_from(["old wrapper", "new wrapper"]),
    st.sets(st.sampled_from(BESIDE)),
    st.sampled_from(["llama", "llama_tied", "qwen2", "qwen3"]),
)
def test_a_wrapper(outer: list[str], form: str, beside: set[str], config: str) -> None:
    before = "".join(outer)
    expected = {name: before + spelled(name, form, "model.") for name in own(CONFIGS[config])}
    stored = [*expected.values(), *(before + name for name in beside)]
    assert both(stored, CONFIGS[config], find_wrapper("llava")) == (expected, expected)


@settings(max_examples=100, deadline=None)
@given(OUTER, OUTER, st.sampled_from(["llama", "llama_tied", "gpt_neox"]), st.floats(0.3, 1.0))
def test_two_prefixes_are_never_read_as_one(one: list[str], other: list[str], config: str, share: float) -> None:
    """A second saving, whole or in part, under another prefix: neither reading takes the file for one model."""
    names = own(CONFIGS[config])
    first = {f"{''.join(one)}{name}" for name in names}
    second = {f"{''.join(other)}{name}" for name in names[: max(1, int(share * len(names)))]}
    clean = [".".join(word for word in name.split(".") if word not in ("_orig_mod", "_fsdp_wrapped_module")) for name in first | second]
    if second <= first or len(set(clean)) < len(clean):
        return
    assert both(sorted(first | second), CONFIGS[config], None) == (None, None)


@settings(max_examples=100, deadline=None)
@given(OUTER, st.sampled_from(["llama", "qwen3"]), st.integers(0, 10**6), st.sampled_from(["lacks", "has more"]))
def test_a_tensor_too_few_or_too_many(outer: list[str], config: str, index: int, how: str) -> None:
    stored = ["".join(outer) + name for name in own(CONFIGS[config])]
    if how == "lacks":
        del stored[index % len(stored)]
    else:
        stored.append("".join(outer) + f"model.layers.{index % 2}.self_attn.z_proj.weight")
    assert both(stored, CONFIGS[config], None) == (None, None)


@pytest.mark.parametrize("name", ["module", "module.", ".", "", "..", "model", "model..weight", "a" * 300])
def test_odd_names_raise_nothing_odd(name: str) -> None:
    first, second = both([*own(CONFIGS["llama"]), name], CONFIGS["llama"], None)
    assert first is None and second is None
