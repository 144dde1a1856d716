"""The documentation is what the code says: pages that are made are fresh, commands and options are described, names exist."""

import re
import sys
from pathlib import Path

import click
import pytest
import yaml
from conftest import CONFIGS, write_recipe, write_sources

import bam_merge
from bam_merge.architectures.tables import dense_families, load_architecture, mixture_layouts
from bam_merge.cli import cli
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.recipe.schema import schema

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import reference  # noqa: E402


@pytest.mark.parametrize("page", reference.PAGES)
def test_reference_pages_are_fresh(page: str) -> None:
    assert (reference.FOLDER / page).read_text(encoding="utf-8") == reference.PAGES[page](), "run python scripts/reference.py"


def test_no_other_reference_pages() -> None:
    made = {path.name for path in reference.FOLDER.glob("*.md") if reference.MADE in path.read_text(encoding="utf-8")}
    assert made == set(reference.PAGES)


@pytest.mark.parametrize("command", cli.commands)
def test_commands_and_options_are_described(command: str) -> None:
    text = reference.PAGES["command-line.md"]()
    assert f"## bam-merge {command}\n" in text and (cli.commands[command].help or "").strip()
    for option in cli.commands[command].params:
        if isinstance(option, click.Option):
            assert (option.help or "").endswith((".", ")")), option.opts
            assert option.opts[-1] in text


def test_every_public_name_is_documented() -> None:
    text = reference.PAGES["python.md"]()
    assert {name for name in bam_merge.__all__ if f"\n### {name}\n" in text} == set(bam_merge.__all__) - {"__version__"}


def test_every_key_of_a_recipe_says_what_it_means() -> None:
    """In the schema, for editors; the reference page shows the same."""
    silent = [
        f"{name}.{key}"
        for name, item in {"": schema(), **schema()["$defs"]}.items()
        for key, value in item.get("properties", {}).items()
        if key not in ("make", "init") and not value.get("description") and "$ref" not in value
    ]
    assert silent == []


def test_readme_names_every_family_and_layout() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What loads where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted(rows) == sorted(layout.name for layout in mixture_layouts())
    sources = re.sub(r"\([^)]*\)|\*", "", text.partition("Dense sources: ")[2].partition(". ")[0])
    assert sorted(re.split(r"[,\s]+", sources.strip())) == sorted(family.name for family in dense_families())


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_readme_names_the_families_of_a_public_layout() -> None:
    """As the reference has them, which tests hold against plans; `of these` takes in those of the row above."""
    text, above = (ROOT / "README.md").read_text(encoding="utf-8"), set[str]()
    names = {family.name for family in dense_families()}
    for layout in mixture_layouts():
        if layout.name == "bam":
            continue
        row = next(line for line in text.splitlines() if line.startswith(f"| `{layout.name}` |"))
        said = names & set(re.findall(r"\w+", row.split("|")[2])) | (above if "of these" in row else set())
        assert said == {family.name for family in dense_families() if not reference.ruled_out(family, layout)}, layout.name
        above = said


@pytest.mark.parametrize("gate", [gate for gate, (of, _) in reference.GATES.items() if of == "softmax"])
@pytest.mark.parametrize(("layout", "family"), [("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3")])
def test_the_gates_of_an_engine_are_those_that_a_plan_does_not_warn_of(layout: str, family: str, gate: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[family])
    notes = plan_file(write_recipe(tmp_path, f"ffn: {{gate: {gate}}}", "btx", output=f"{{path: out, layout: {layout}}}")).notes
    table = load_architecture(layout)
    assert gate in reference.gates_of(table)
    assert {engine.name for engine in table.engines} == {"vLLM", "llama.cpp"}
    for engine in table.engines:
        warned = any(
            "norm_topk_prob" in note and note.partition(": norm_topk_prob is ")[2].partition(": ")[2].startswith(engine.name)
            for note in notes
        )
        assert (gate not in reference.gates_of(table, engine.name)) == warned


def test_mixtral_has_one_gate() -> None:
    assert reference.gates_of(load_architecture("mixtral")) == ["topk_then_softmax"]


@pytest.mark.parametrize(("layout", "gates"), [
    ("solar_open", ["topk_then_sigmoid"]), ("cohere2_moe", ["topk_then_softmax", "topk_then_sigmoid"]), ("hunyuan_v1_moe", ["topk_then_softmax"]),
    ("flex_olmo", ["softmax_then_topk", "topk_then_softmax"]), ("bam", ["softmax_then_topk", "topk_then_softmax", "topk_then_sigmoid"]),
])  # fmt: skip
def test_the_gates_of_a_layout_are_those_that_a_plan_takes(layout: str, gates: list[str], tmp_path: Path) -> None:
    table = load_architecture(layout)
    assert reference.gates_of(table) == gates
    family = {"hunyuan_v1_moe": "hunyuan_v1_dense", "cohere2_moe": "cohere2", "flex_olmo": "olmo2"}.get(layout, "llama")
    write_sources(tmp_path, CONFIGS[family])
    for gate in reference.GATES:
        path = write_recipe(tmp_path, f"ffn: {{gate: {gate}}}", "btx", output=f"{{path: out, layout: {layout}}}")
        if gate in gates:
            assert plan_file(path).config["model_type"] == layout
        else:
            with pytest.raises(BamMergeError, match=f"{layout} needs (scoring_func|norm_topk_prob) = "):
                plan_file(path)


def test_contributing_lists_the_parts_of_make_check() -> None:
    parts = re.search(r"^check: ([^#\n]+)", MAKEFILE, re.M)
    assert parts is not None
    listed = re.findall(r"^\| `make ([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert listed == parts[1].split()


def test_pre_commit_runs_what_make_lint_does() -> None:
    """By the same tools in the same versions: those of .venv."""
    lint = re.findall(r"^\t\$\(BIN\)/(\S+.*)$", MAKEFILE.partition("\nlint: ")[2].partition("\n\n")[0], re.M)
    document = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix") for repo in document["repos"] for hook in repo["hooks"]]
    assert len(hooks) == 3
    assert all(any(line.startswith(hook) for line in lint) for hook in hooks), (hooks, lint)
