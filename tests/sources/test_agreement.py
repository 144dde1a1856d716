"""Sources that do not agree: one message for one cause, long lists shown where they differ, advice that can be followed."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from damage import add, edit_config, split, write

from bam_merge.demo.synthetic import branched_values, write_checkpoint
from bam_merge.sources.agreement import contrast

DEEP = {"num_hidden_layers": 12}
SLIDING = ["sliding_attention", "full_attention"] * 6

CAUSES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a window, and none": ("mistral", {"sliding_window": 16}, {"sliding_window": None}, "sliding_window = null, sources.seed has 16"),
    "none, and a window": ("mistral", {"sliding_window": None}, {"sliding_window": 16}, "sliding_window = 16, sources.seed has null"),
    "two windows": ("mistral", {"sliding_window": 16}, {"sliding_window": 32}, "sliding_window = 32, sources.seed has 16"),
    "a window switched on": ("qwen2", {"sliding_window": 16, "max_window_layers": 0}, {"sliding_window": 16, "max_window_layers": 0, "use_sliding_window": True}, "sliding_window = 16, sources.seed has null"),
    "phi3's window": ("phi3", {}, {"sliding_window": 16}, "sliding_window = 16, sources.seed has null"),
    "which layers slide": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING}, {"use_sliding_window": True, "sliding_window": 8, "layer_types": [*SLIDING[:8], *reversed(SLIDING[8:])]}, "layer_types[8] = 'full_attention', sources.seed has 'sliding_attention' (config.json), and 3 more of its entries differ"),
    "layers from which they slide": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5}, "layer_types[4] = 'full_attention', sources.seed has 'sliding_attention'"),
    "layers": ("llama", {}, {"num_hidden_layers": 11}, "num_hidden_layers = 11, sources.seed has 12"),
    "layers that slide": ("mistral", {}, {"num_hidden_layers": 11}, "num_hidden_layers = 11, sources.seed has 12"),
    "heads": ("llama", {"num_key_value_heads": 2, "head_dim": ...}, {"num_attention_heads": 8}, "num_attention_heads = 8, sources.seed has 4"),
    "heads without groups": ("gpt_neox", {}, {"num_attention_heads": 8}, "num_attention_heads = 8, sources.seed has 4"),
    "biases": ("llama", {}, {"attention_bias": True}, "attention_bias = true, sources.seed has false"),
    "biases of the FFN": ("llama", {}, {"mlp_bias": True}, "mlp_bias = true, sources.seed has false"),
    "biases of cohere": ("cohere", {}, {"attention_bias": True}, "attention_bias = true, sources.seed has false"),
    "biases of gpt_neox": ("gpt_neox", {}, {"attention_bias": False}, "attention_bias = false, sources.seed has true"),
    "norms of heads": ("cohere", {}, {"use_qk_norm": True}, "use_qk_norm = true, sources.seed has false"),
    "block": ("gpt_neox", {}, {"use_parallel_residual": False}, "use_parallel_residual = false, sources.seed has true"),
    "vocabulary": ("qwen2", {}, {"vocab_size": 72}, "vocab_size = 72, sources.seed has 64"),
    "width of the FFN": ("phi3", {}, {"intermediate_size": 48}, "intermediate_size = 48, sources.seed has 40"),
    "ties": ("llama", {}, {"tie_word_embeddings": True}, "tie_word_embeddings = true, sources.seed has false"),
    "eps": ("gpt_neox", {}, {"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06, sources.seed has 1e-05"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_one_cause_is_one_message(name: str, tmp_path: Path, run: Any) -> None:
    family, first, other, message = CAUSES[name]
    plain = {key: value for key, value in {**CONFIGS[family], **DEEP, **first}.items() if value is not ...}
    write_sources(tmp_path, plain, ("seed",))
    write_checkpoint(tmp_path / "law", {**plain, **other}, branched_values(7, 1))
    result = run("plan", write_recipe(tmp_path, names=("seed", "law")))
    assert result.status == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: sources.law: {message}")
    assert len(lines[0]) < 250


def test_two_causes_are_two_messages(tmp_path: Path, run: Any) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    write_sources(tmp_path, {**CONFIGS["qwen2"], **DEEP, **sliding}, ("seed", "law"))
    edit_config(tmp_path / "law", sliding_window=16, max_window_layers=3, rms_norm_eps=1e-4)
    result = run("plan", write_recipe(tmp_path, names=("seed", "law")))
    assert [line.split()[2] for line in result.err.splitlines()[:3]] == ["rms_norm_eps", "sliding_window", "layer_types[3]"]


def test_a_head_size_that_is_written_down_is_a_cause_of_its_own(tmp_path: Path, run: Any) -> None:
    plain = {**CONFIGS["llama"], "head_dim": 8}
    write_sources(tmp_path, plain, ("seed",))
    write_checkpoint(tmp_path / "law", {**plain, "num_attention_heads": 8, "head_dim": 16}, branched_values(7, 1))
    result = run("plan", write_recipe(tmp_path, names=("seed", "law")))
    assert [line.split()[2] for line in result.err.splitlines()[:2]] == ["num_attention_heads", "head_dim"]


@pytest.mark.parametrize(("mine", "theirs", "expected"), [
    ([1, 2, 3], [1, 5, 3], ("k[1]", "2", "5", "")),
    ([1, 2, 3], [0, 0, 0], ("k[0]", "1", "0", ", and 2 more of its entries differ")),
    ([1, 2], [1], ("length of k", "2", "1", "")),
    ({"a": 1, "b": 2}, {"a": 1}, ("k.b", "2", "none", "")),
    ({"a": None}, {"a": [1] * 99}, ("k.a", "null", "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,... (297 characters)", "")),
    (True, None, ("k", "true", "null", "")),
    ([], [], ("k", "[]", "[]", "")),
])  # fmt: skip
def test_contrast(mine: Any, theirs: Any, expected: tuple[str, str, str, str]) -> None:
    assert contrast("k", mine, theirs) == expected


# ---- dtypes ----------------------------------------------------------------------------------------------------------------


def as_fp8(folder: Path, dtype: str = "F8_E4M3") -> None:
    """The same tensors, each a byte an element."""
    header, _ = split(folder / "model.safetensors")
    end = 0
    for record in header.values():
        if "shape" in record:
            size = 1
            for dimension in record["shape"]:
                size *= dimension
            record.update(dtype=dtype, data_offsets=[end, end + size])
            end += size
    write(folder / "model.safetensors", json.dumps(header).encode(), bytes(end))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
@pytest.mark.parametrize("target", [None, "bfloat16"])
def test_advice_for_stored_dtypes_can_be_followed(dtype: str, target: str | None, llamas: Path, run: Any) -> None:
    """No advice to set a dtype to which these cannot be converted."""
    as_fp8(llamas / "law", dtype)
    output = f"{{path: out, dtype: {target}}}" if target else "{path: out}"
    result = run("plan", write_recipe(llamas, "shared: {make: copy, from: seed}", output=output))
    assert result.status == 2
    assert "Set dtype" not in result.err
    assert ("cannot be converted here: convert those sources to bfloat16 first" in result.err) == (target is None)
    assert ("which cannot be converted to BF16. Convert that source first, or use its full-precision model." in result.err) == bool(target)


def test_advice_for_dtypes_that_can_be_converted(llamas: Path, run: Any) -> None:
    write_sources(llamas, CONFIGS["llama"], ("law",), "BF16")
    result = run("plan", write_recipe(llamas))
    assert "Set dtype: bfloat16 (or another)." in result.err
    assert run("plan", write_recipe(llamas, output="{path: out, dtype: bfloat16}")).status == 0


def test_names_stay_printable(llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", **{"a\x1b[31m": {"\x1bb": ["\x1bc"]}})
    add(llamas / "code", "x")
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert "\x1b" not in result.err
