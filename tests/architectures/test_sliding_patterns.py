"""Sliding patterns as numbers and as texts, and layers that turn only where they slide: as transformers' Exaone4Config reads them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CONFIGS
from toys import as_toy, toy_family

from bam_merge.architectures.config import describe
from bam_merge.architectures.spellings import conflicts
from bam_merge.architectures.tables import load_architecture
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config

__all__ = ["toy_family"]

transformers = pytest.importorskip("transformers")

FULL, SLIDES = "full_attention", "sliding_attention"
TOY = as_toy(
    "qwen3", "lllg",
    ('windows = "by layer"', 'windows = "all but each last"\npattern_is_read = true\npattern_is_text = true\nturning = "where windows are, or all"'),
    ('sliding_window = 4096, use_sliding_window = false, max_window_layers = 28', 'sliding_window = 4096, sliding_window_pattern = 4'),
    ('"sliding_window", "layer_types"]', '"sliding_window", "layer_types", "sliding_window_pattern"]'), ('neutral = ["use_sliding_window", "max_window_layers"]', "neutral = []"),
)  # fmt: skip
BASE = {**CONFIGS["qwen3"], "model_type": "lllg", "num_hidden_layers": 6}
KEYS: dict[str, tuple[Any, ...]] = {
    "sliding_window": ("", None, 8), "sliding_window_pattern": ("", None, 1, 3, "LLG", "LG", "L", "G"),
    "layer_types": ("", [SLIDES, SLIDES, FULL] * 2, [FULL] * 6, [SLIDES] * 6, [SLIDES, FULL] * 3),
}  # fmt: skip


def test_every_combination_is_refused_or_read_as_transformers_does(toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    table, read, texts = load_architecture("lllg"), 0, 0
    for values in itertools.product(*KEYS.values()):
        config = BASE | {key: value for key, value in zip(KEYS, values, strict=True) if value != ""}
        problems = conflicts(table, config)
        facts = describe(table, config, problems)
        if problems:
            with pytest.raises(CheckpointError):
                model_config(config)
            continue
        read += 1
        texts += isinstance(config.get("sliding_window_pattern"), str)
        theirs = transformers.Exaone4Config(**{key: value for key, value in config.items() if key != "model_type"})
        slides = [kind == SLIDES and theirs.sliding_window is not None for kind in theirs.layer_types]
        turning = [layer for layer in range(6) if theirs.sliding_window is None or slides[layer]]
        for said in (facts, vars(model_config(config))):
            assert [kind == SLIDES and said["sliding_window"] is not None for kind in said["layer_types"]] == slides, config
            assert (list(range(6)) if said["rope_layers"] is None else said["rope_layers"]) == turning, config
    assert read > 20
    assert texts > 4


@pytest.mark.parametrize(("keys", "message"), [
    ({"sliding_window_pattern": "LLG"}, "sliding_window_pattern = 'LLG' without layer_types: transformers loads no such lllg. Write layer_types."),
    ({"sliding_window_pattern": "LLG", "layer_types": [SLIDES, FULL] * 3}, "layer_types says that layers 0, 2, 4 slide, sliding_window_pattern = 'LLG' that layers 0, 1, 3, 4 do"),
    ({"sliding_window_pattern": "LLX"}, "sliding_window_pattern must be a positive integer, found 'LLX'."),
    ({"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer, found 0."),
    ({"sliding_window_pattern": None}, "sliding_window_pattern is null, which is no value of it"),
    ({"sliding_window": None}, "sliding_window is no number, and layers of lllg slide unless layer_types says otherwise."),
])  # fmt: skip
def test_what_is_wrong_is_said(keys: dict[str, Any], message: str, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    table, problems = load_architecture("lllg"), list[str]()
    describe(table, {**BASE, **keys}, problems)
    assert any(message in problem for problem in (*problems, *conflicts(table, {**BASE, **keys})))


def test_the_last_layer_may_have_no_window_whatever_the_text_says(toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    types = [SLIDES, SLIDES, SLIDES, FULL, SLIDES, FULL]
    assert conflicts(load_architecture("lllg"), {**BASE, "sliding_window_pattern": "LLLG", "layer_types": types}) == []
