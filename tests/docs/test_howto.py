"""The how-tos for those who add something are followed to the letter, in a copy of the repository: what they make must plan, merge, verify."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import DOCS, ROOT, follow

from bam_merge.architectures.tables import dense_families
from bam_merge.architectures.vocabulary import ROLES, TRAITS


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The package and its tests, to be changed."""
    for folder in ("bam_merge", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, call in (("bam-merge", "-m bam_merge"), ("python", "")):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        command.chmod(0o755)
    return tmp_path


def run_in(clone: Path, command: str) -> str:
    """What a command prints, messages first; the package is the clone's."""
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stderr + done.stdout


@pytest.mark.parametrize(("page", "commands"), [("add-a-family", 4), ("add-a-layout", 6), ("add-a-method", 5)])
def test_page_is_true(page: str, commands: int, clone: Path) -> None:
    assert follow(DOCS / "how-to" / f"{page}.md", clone, lambda command: run_in(clone, command)) == commands


def test_the_copy_is_what_runs(clone: Path) -> None:
    (clone / "bam_merge" / "_version.py").write_text('__version__ = "0.0.0-copy"\n')
    assert "0.0.0-copy" in run_in(clone, "bam-merge --version")


# ---- toys that no page shows -----------------------------------------------------------------------------------------------------------

OTHER: dict[str, object] = {
    "norm_type": "layer_norm", "parallel_norms": 1, "norm_offset": 1, "attention_scale": 0.3, "embedding_scale": 2.0, "residual_scale": 0.5,
    "logit_scale": 0.5, "attention_softcap": 2.0, "attention_clip": 0.5, "logit_softcap": 2.0, "qk_norm_shape": "heads",
}  # fmt: skip
"""A value of each trait that is not the usual one, where there are more than two."""

NEEDS = {
    "embedding_scale_in_dtype": "embedding_scale", "qk_norm_after_rotary": "qk_norm", "qk_norm_shape": "qk_norm", "qk_norm_bias": "qk_norm",
    "norm_bias": "norm_type", "parallel_norms": "parallel_block", "pre_norms": "post_norms",
}  # fmt: skip
"""Traits that mean nothing without another one."""

BIASES = {
    "attn.q": "attention_bias",
    "attn.k": "attention_bias",
    "attn.v": "attention_bias",
    "attn.o": "attention_out_bias",
    "attn.gate": "attention_bias",
    "head": "head_bias",
}
ONLY_WITH = {"attn.gate": "attention_gate", "layer.scale": "layer_scale"}
"""Roles of parts that a trait adds."""

SIZES = {
    "embed": ["V", "d"], "head": ["V", "d"], "attn.q": ["H*D", "d"], "attn.k": ["K*D", "d"], "attn.v": ["K*D", "d"], "attn.o": ["d", "H*D"],
    "attn.gate": ["H*D", "d"], "layer.scale": ["1"], "ffn.gate": ["f", "d"], "ffn.up": ["f", "d"], "ffn.down": ["d", "f"],
}  # fmt: skip


def combination(number: int) -> dict[str, object]:
    """Some of all traits, at a value that is not the usual one."""
    draw = random.Random(number)
    usual = dict(TRAITS) | {"norm_type": "rms_norm"}
    chosen = {trait: OTHER[trait] if type(value) is not bool else not value for trait, value in usual.items() if draw.random() < 0.5}
    if "parallel_block" in chosen:
        chosen.pop("pre_norms", None)
    if "norm_weights" in chosen:  # norms that have none have nothing that could be offset or biased
        chosen = {trait: value for trait, value in chosen.items() if trait not in ("norm_offset", "norm_bias", "qk_norm")}
    for _ in NEEDS:  # what needs something that needs something
        chosen = {trait: value for trait, value in chosen.items() if NEEDS.get(trait, trait) in chosen}
    return {"norm_type": "rms_norm", **chosen}


def rows_of(traits: dict[str, object]) -> Iterator[tuple[str, list[str]]]:
    """The roles that a model with these traits has, and their shapes."""
    has = {**TRAITS, **traits}
    heads = has.get("qk_norm_shape") or ("heads" if has["norm_type"] == "layer_norm" else "head")
    for role in ROLES:
        weight = role.removesuffix(".bias")
        is_bias = weight != role
        if weight.startswith(("router", "linear.")) or (weight == "ffn.gate" and not has["gated_ffn"]):
            continue
        if (weight in ONLY_WITH and not has[ONLY_WITH[weight]]) or (weight == "attn.v" and has["values_are_keys"]):
            continue
        if weight.startswith("norm."):
            if not has.get("norm_weights", True):
                continue
            post = weight.endswith(".post")
            missing = not has.get("post_norms") if post else weight != "norm.final" and not has.get("pre_norms", True)
            second = weight == "norm.ffn" and has["parallel_block"] and has["parallel_norms"] == 1
            if missing or second or (is_bias and not has["norm_bias"]):
                continue
            shape = ["d"]
        elif weight.endswith("_norm"):
            if not has["qk_norm"] or (is_bias and not has.get("qk_norm_bias")):
                continue
            shape = ["D"] if heads == "head" else ["H" if weight == "attn.q_norm" else "K", "D"]
        elif is_bias and not has[BIASES.get(weight, "mlp_bias")]:
            continue
        else:
            shape = SIZES[weight][:1] if is_bias else SIZES[weight]
        yield role, shape


def table_of(name: str, traits: dict[str, object]) -> str:
    """A table of a family with these traits, and with names of its own."""

    def word(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else repr(value)

    stated = "\n".join(f"{trait} = {word(value)}" for trait, value in traits.items())
    inside = lambda role: role.startswith(("norm.attn", "norm.ffn", "attn.", "ffn.", "layer."))  # noqa: E731
    rows = [(f"toy.{'{layer}.' if inside(role) else ''}{role.removesuffix('.bias').replace('.', '_')}.{'bias' if role.endswith('.bias') else 'weight'}", role, shape) for role, shape in rows_of(traits)]  # fmt: skip
    ordered = [row for row in rows if row[1] == "embed"] + [row for row in rows if inside(row[1])] + [row for row in rows if not inside(row[1]) and row[1] != "embed"]  # fmt: skip
    lines = ",\n".join(f"    {{ role = '{role}', name = '{place}', shape = {shape} }}" for place, role, shape in ordered)
    return (
        f"name = '{name}'\nkind = 'dense'\nmodel_types = ['{name}']\nclass = 'Toy'\nfunction = ['rms_norm_eps', 'layer_norm_eps']\n"
        "defaults = { rms_norm_eps = 1e-5, layer_norm_eps = 1e-5, tie_word_embeddings = false, hidden_act = 'silu' }\n"
        f"\n[traits]\n{stated}\n\n[tensors]\nrows = [\n{lines},\n]\n"
    )


TRIED = """
import sys, tempfile
from pathlib import Path
from conftest import BASE, GROUPED, write_recipe, write_sources
from proofs import failed
from test_exported import assert_equals_reference
from test_model import build, ids, write_three
from bam_merge.planning.make import plan_file
from bam_merge.verifying.verification import verify

for name in sys.argv[1:]:
    folder = Path(tempfile.mkdtemp(dir="."))
    write_three(folder, {"model_type": name, **BASE, **GROUPED, "head_dim": 12})
    made = build(folder, "ffn: {top_k: 2, gate: topk_then_softmax}")
    report = verify(made)
    assert report.ok, (name, failed(report))
    assert {"expert isolation", "identity"} <= {check.name for check in report.checks}
    assert_equals_reference(made, ids())
    print("tried", name)
"""


def test_any_combination_of_traits_is_a_table_and_no_python(clone: Path) -> None:
    """Of all traits that tables have, at random, such as no family has: merged, proved and exported, with nothing added but the tables."""
    numbers: list[int] = []
    for number in range(200):
        if len(numbers) < 6 or set(combination(number)) - {trait for chosen in numbers for trait in combination(chosen)}:
            numbers.append(number)
    names = [f"toy{number}" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        traits = combination(number)
        assert traits not in [dict(family.traits) for family in dense_families()]
        (clone / "bam_merge" / "architectures" / "families" / f"{name}.toml").write_text(table_of(name, traits))
    assert {trait for number in numbers for trait in combination(number)} == set(TRAITS)
    (clone / "tried.py").write_text(TRIED)
    folders = os.pathsep.join(["tests", "tests/model", "tests/exported", "tests/verifying", "."])
    printed = run_in(clone, f"PYTHONPATH={folders} python tried.py {' '.join(names)}")
    assert [line for line in printed.splitlines() if line.startswith("tried ")] == [f"tried {name}" for name in names], printed
