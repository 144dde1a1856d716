"""Architecture tables are read strictly: whoever adds a family and misspells a word is told which, and what was meant."""

import ast
from pathlib import Path

import pytest

import bam_merge
from bam_merge.architectures.strict_tables import TableError
from bam_merge.architectures.table_files import table_text
from bam_merge.architectures.tables import Quirks, architectures, read_table
from bam_merge.architectures.wrappers import read_wrapper

LLAMA = table_text("llama")
QWEN2_MOE = table_text("qwen2_moe")

WRONG = {
    "a row's key": ('when = "untied"', 'wen = "untied"', "rows[{last}].wen: unknown key; did you mean 'when'?"),
    "a section": ("[traits]", "[trails]", "trails: unknown key; did you mean 'traits'?"),
    "a trait": ("gated_ffn = true", "gated_fnn = true", "traits.gated_fnn: no such trait; did you mean 'gated_ffn'?"),
    "a far trait": ("gated_ffn = true", "zzz = true", "traits.zzz: no such trait. Known: norm_type, norm_bias, "),
    "a kind": ('kind = "dense"', 'kind = "dens"', "kind is 'dens', expected one of dense, mixture, foreign; did you mean 'dense'?"),
    "a role": ('role = "ffn.down"', 'role = "fnn.down"', "'fnn.down' is no role; did you mean 'ffn.down'?"),
    "a letter": (
        'shape = ["V", "d"]',
        'shape = ["V", "e"]',
        "shape: 'e': 'e' is neither an integer nor one of V, d, f, H, K, D, N, S, Hk, Hv, Dk, Dv, c.",
    ),
    "a placeholder": (
        "{layer}.mlp.down_proj",
        "{layr}.mlp.down_proj",
        ".name: {layr} is neither {layer} nor {expert}; did you mean 'layer'?",
    ),
    "a quirk": ("[traits]", '[quirks]\nwindow = "all"\n[traits]', "quirks.window: unknown key; did you mean 'windows'?"),
    "a word of a quirk": (
        "[traits]",
        '[quirks]\nwindows = "all if use"\n[traits]',
        "quirks.windows: 'all if use' is not possible; did you mean 'all if used'?",
    ),
    "a rotary base": (
        "[traits]",
        '[quirks]\nrotary_base = "rope_teta"\n[traits]',
        "quirks.rotary_base: 'rope_teta' is not possible; did you mean 'rope_theta'?",
    ),
    "a key of experts": (
        "[traits]",
        '[quirks]\nexperts = ["num_expert"]\n[traits]',
        "quirks.experts: 'num_expert' is not possible; did you mean 'num_experts'?",
    ),
    "windows without a word for them": (
        'function = ["rms_norm_eps"',
        'function = ["sliding_window", "rms_norm_eps"',
        "quirks.windows is missing: the table names sliding_window, and windows are one of none, all, all if used, by layer, ",
    ),
    "what is worked out": (
        "[traits]",
        '[quirks]\nworked_out = { head_dim = "hidden_siz / num_attention_heads" }\n[traits]',
        "quirks.worked_out.head_dim: 'hidden_siz' is no size; did you mean 'hidden_size'?",
    ),
    "a word for turning": (
        "[traits]",
        '[quirks]\nturning = "some"\n[traits]',
        "quirks.turning: 'some' is not possible. Known: all, where windows are, where windows are, or all, listed, if rope.",
    ),
    "a power": (
        "[traits]",
        '[traits]\nlogit_scale = "config:logits_scaling^x"',
        "traits.logit_scale: found 'config:logits_scaling^x', expected a value, config:KEY, or config:KEY^POWER.",
    ),
    "a condition": ('when = "untied"', 'when = "unties"', ".when: 'unties' is no trait; did you mean 'untied'?"),
    "a case": ("[traits]", "[[cases]]\nwhere = { a = 1 }\n[traits]", "cases[0]: needs facts (what holds then) or refused"),
    "a fact of a case": (
        "[traits]",
        "[[cases]]\nwhere = { a = 1 }\nfacts = { num_heads = 1 }\n[traits]",
        "cases[0].facts: 'num_heads' is neither a size nor a trait",
    ),
    "a reason for nothing": (
        "[traits]",
        '[quirks]\nreasons = { alibi = "x" }\n[traits]',
        "quirks.reasons.alibi: quirks.only says nothing of it",
    ),
    "a key elsewhere": (
        "[traits]",
        '[quirks]\ntaken_from = { hidden_act = "a and b" }\n[traits]',
        "quirks.taken_from.hidden_act: found 'a and b', expected KEY",
    ),
    "a missing key": ('class = "LlamaForCausalLM"', "", "class is missing."),
    "another type": ('model_types = ["llama"]', 'model_types = "llama"', "model_types: found 'llama', expected list."),
    "both role and roles": ('role = "ffn.down"', 'role = "ffn.down", roles = ["ffn.up"]', "needs role (one) or roles (several"),
    "parts": ('role = "ffn.down"', 'roles = ["ffn.down", "ffn.up"]', "2 roles need as many parts, found 0."),
}


def test_the_tables_of_the_package_are_strict_ones() -> None:
    assert read_table(LLAMA, "llama.toml").name == "llama"


@pytest.mark.parametrize("case", WRONG)
def test_what_is_misspelt_is_named(case: str) -> None:
    old, new, message = WRONG[case]
    assert old in LLAMA
    last = LLAMA[: LLAMA.index(old)].count("{ role") - 1
    with pytest.raises(TableError) as caught:
        read_table(LLAMA.replace(old, new, 1), "mine.toml")
    assert message.replace("{last}", str(last)) in str(caught.value) and "mine.toml: " in str(caught.value)


def test_a_family_without_quirks_reads_as_most_do() -> None:
    assert "[quirks]" not in LLAMA
    assert read_table(LLAMA, "llama.toml").quirks == Quirks()


PACKAGE = Path(bam_merge.__file__).parent
NAMES = {word for table in architectures() for word in (table.name, table.class_name, *table.model_types)} - {"bam", "BamForCausalLM"}


def test_no_python_names_a_family() -> None:
    """A new family is a table: what is special about one stands there. (The exported model is bam's own, the demonstration makes a model.)"""
    assert {"llama", "gpt_neox", "qwen3_moe", "deepseek_v3"} <= NAMES
    modules = [path for path in PACKAGE.rglob("*.py") if not {"exported", "demo"} & set(path.relative_to(PACKAGE).parts)]
    assert len(modules) > 100
    named = [f"{path.relative_to(PACKAGE)}: {word}" for path in modules for word in _constants(path) if word in NAMES]
    assert named == []
    assert "llama" in _constants(PACKAGE / "demo" / "demo.py")  # which is how one would be found


def _constants(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_all_problems_are_told_at_once() -> None:
    text = LLAMA.replace('role = "ffn.down"', 'role = "fnn.down"').replace('role = "ffn.up"', 'role = "fnn.up"')
    with pytest.raises(TableError) as caught:
        read_table(text, "mine.toml")
    assert len(str(caught.value).splitlines()) == 2


def test_limits_are_strict_too() -> None:
    assert "[[limits]]" in QWEN2_MOE
    with pytest.raises(TableError, match="did you mean 'otherwise'"):
        read_table(QWEN2_MOE.replace("otherwise", "otherwize", 1), "mine.toml")
    for wrong in (
        QWEN2_MOE.replace('engines = ["vLLM", "llama.cpp"]', 'engines = ["vLLM", "lama.cpp"]', 1),
        QWEN2_MOE.replace('engines = ["llama.cpp"]', 'engines = ["lama.cpp"]', 1),
    ):
        assert wrong != QWEN2_MOE
        with pytest.raises(TableError, match=r"did you mean 'llama\.cpp'"):
            read_table(wrong, "mine.toml")


WRAPPER = """
name = "w"
model_types = ["w"]
class = "W"
config = ["text_config"]
tied = false
spellings = [{ trunk = "language_model.model.", rest = "language_model." }]
[beside]
tower = ["vision_tower"]
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ('tied = false', 'tyed = false', "w.toml: tyed: unknown key; did you mean 'tied'?"),
    ('tied = false', 'tied = "no"', "w.toml: tied: found 'no', expected bool."),
    ('class = "W"\n', '', "w.toml: class is missing."),
    ('trunk = ', 'trunc = ', "w.toml: spellings[0].trunc: unknown key; did you mean 'trunk'?"),
    ('"language_model."', '"language_model"', "w.toml: spellings[0].rest: 'language_model' must end with a dot: it stands before a name."),
    ('["vision_tower"]', '"vision_tower"', "w.toml: beside.tower: found 'vision_tower', expected a list of first words of names, without a dot at their end."),
    ('["vision_tower"]', '["vision_tower."]', "w.toml: beside.tower: found ['vision_tower.'], expected a list of first words of names, without a dot at their end."),
])  # fmt: skip
def test_a_wrappers_table_is_read_strictly(old: str, new: str, message: str) -> None:
    assert read_wrapper(WRAPPER, "w.toml").what("model.vision_tower.x") == "tower"
    with pytest.raises(TableError) as error:
        read_wrapper(WRAPPER.replace(old, new), "w.toml")
    assert message in str(error.value).splitlines()
