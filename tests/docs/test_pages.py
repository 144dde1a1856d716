"""What the pages show is true: commands parse, the tutorial runs and prints what it says, recipes plan, links lead somewhere."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pages
import pytest
import yaml
from adapter_files import write_adapter
from conftest import CONFIGS, write_recipe, write_sources
from pages import DOCS, MARK, ROOT, Block, blocks, follow
from scenes import write_texts
from vocabularies import three, tokenizer_json

from bam_merge.cli import cli
from bam_merge.demo.synthetic import write_checkpoint
from bam_merge.planning.make import make_plan
from bam_merge.recipe.load import load_recipe
from bam_merge.recipe.schema import Ffn

PAGES = {pages.name(page): page for page in pages.pages()}
BLOCKS = [block for page in PAGES.values() for block in blocks(page)]
FOLLOWED = {
    "docs/tutorial/first-merge.md", "docs/how-to/add-a-family.md", "docs/how-to/add-a-layout.md", "docs/how-to/add-a-method.md",
    "docs/how-to/resume.md", "docs/how-to/align-vocabularies.md", "docs/how-to/experts-from-adapters.md", "docs/how-to/other-forms.md",
    "docs/how-to/from-mergekit.md", "docs/how-to/models-from-the-hub.md", "docs/how-to/use-without-training.md", "docs/how-to/serve.md",
    "docs/how-to/take-an-expert-out.md", "docs/how-to/models-elsewhere.md",
    "docs/how-to/quantise.md",
    "docs/how-to/several-machines.md",
}  # fmt: skip
"""Pages that a test carries out, here, in test_howto.py, in test_hub_page.py, in test_serve_page.py, in test_machines_page.py or in tests/ecosystem."""

FOUR = ("seed", "code", "law", "math")


def shown() -> Iterator[tuple[str, str]]:
    """(place, command line) of every bam-merge command in blocks, then of those in sentences."""
    for block in BLOCKS:
        yield from ((f"{block}", command) for command, _ in block.commands if command.startswith("bam-merge "))
    for page, path in PAGES.items():
        for text in re.findall(r"`(bam-merge [^`]+)`", path.read_text(encoding="utf-8")):
            yield page, " ".join(text.split())


def parsed(command: str) -> click.Context:
    """The context that click makes of a command line, without carrying it out. Placeholders stand for what belongs there."""
    words = ["1" if word in ("N", "K", "X") else word for word in shlex.split(command)[1:] if word != "..."]
    if words[0] not in cli.commands and not any(word.endswith(".yaml") for word in words):
        raise click.UsageError(f"{words[0]} is no command")
    name, rest = (words[0], words[1:]) if words[0] in cli.commands else ("merge", words)
    return cli.commands[name].make_context(name, rest)


@pytest.mark.parametrize(("place", "command"), list(shown()))
def test_commands_shown_are_commands(place: str, command: str) -> None:
    if command.split()[1:] in [[name] for name in cli.commands]:  # in a sentence, where it is called by its name
        return
    try:
        parsed(command)
    except click.ClickException as error:
        pytest.fail(f"{place}: {command}: {error.format_message()}")


def test_the_test_above_sees_what_is_wrong() -> None:
    for wrong in ("bam-merge plan r.yaml --tensor", "bam-merge prove out", "bam-merge r.yaml --workers 0", "bam-merge inspect"):
        with pytest.raises(click.ClickException):
            parsed(wrong)
    assert len(list(shown())) > 40


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands], ids=str)
def test_commands_shown_are_run_or_marked(block: Block) -> None:
    """Every block of commands is made by `make example` and says so, or is carried out by a test, or is of make, pip or python alone."""
    ours = [command for command, _ in block.commands if command.startswith("bam-merge ")]
    assert not ours or block.marked or block.page in FOLLOWED, f"{block}: put {MARK} above it, or follow the page in a test"
    assert not (block.marked and block.page in FOLLOWED), f"{block}: is run, so it needs no mark"


def test_readme_shows_what_the_walk_through_shows() -> None:
    """Of the same command README leaves out more lines, and says nothing else."""
    whole = dict(pair for block in blocks(PAGES["docs/tutorial/smollm2.md"]) for pair in block.commands)
    shorter = [pair for block in blocks(PAGES["README.md"]) if block.marked for pair in block.commands]
    assert len(shorter) == 2
    for command, lines in shorter:
        left = iter(whole[command].splitlines())
        assert all(line in left for line in lines.splitlines() if line != "..."), command


def test_the_errors_of_readme_come_together(tmp_path: Path, run: Any) -> None:
    """Those of a vocabulary of 128,256; here of one of 64."""
    write_sources(tmp_path, CONFIGS["llama"], FOUR)
    write_sources(tmp_path, {**CONFIGS["llama"], "vocab_size": 65}, ("law",))
    write_sources(tmp_path, {**CONFIGS["llama"], "tie_word_embeddings": True}, ("math",))
    config = json.loads((tmp_path / "math" / "config.json").read_text())
    (tmp_path / "math" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (block,) = [block for block in blocks(PAGES["README.md"]) if block.text.startswith("error: ")]
    said = run("plan", write_recipe(tmp_path, names=FOUR)).err.splitlines()
    wanted = block.text.replace("128260", "65").replace("128256", "64").splitlines()
    assert sorted(said) == sorted([*wanted, "2 problems; nothing was written."])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where merges are verified as a user's are, and a terminal of 80 columns."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_the_tutorial_runs(here: Path, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    printed: dict[str, str] = {}

    def call(command: str) -> str:
        if command.startswith("pip "):
            return ""
        result = run(*shlex.split(command)[1:])
        printed[command] = result.err + result.out
        return printed[command]

    def execute(code: str) -> None:
        exec(compile(code, "first-merge.md", "exec"), {})
        assert capsys.readouterr().out == "16,262,400 parameters in 117 tensors\n"

    assert follow(DOCS / "tutorial" / "first-merge.md", here, call, execute) == 8
    manifest = json.loads((here / "btx" / "bam_merge.json").read_text(encoding="utf-8"))
    described = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (DOCS / "reference" / "manifest.md").read_text(encoding="utf-8"), re.M)
    assert {*manifest, "refreshed"} == {key.strip("` ") for keys in described for key in keys.split(",")}  # refreshed: of a renewed folder
    checks = re.findall(r"^(\w+(?: \w+)*)  +(?:ok|failed)\b", printed["bam-merge verify btx"], re.M)
    explained = (DOCS / "explanation" / "exactness.md").read_text(encoding="utf-8")
    assert len(checks) > 15 and [name for name in checks if not re.search(rf"[| ]{name}[,  ]", explained)] == []


def test_experts_from_adapters_run(here: Path, run: Any) -> None:
    write_sources(here / "models", CONFIGS["llama"], ("seed",), "BF16")
    for name in ("code", "law"):
        write_adapter(here / "adapters" / name, here / "models" / "seed", seed=len(name))

    def call(command: str) -> str:
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, result.err
        return str(result.err + result.out)

    assert follow(PAGES["docs/how-to/experts-from-adapters.md"], here, call) == 4
    assert all((here / "out" / name / "bam_merge.json").exists() for name in ("mixture", "two"))


def test_other_forms_run(here: Path, run: Any) -> None:
    """Of small models: one pickled, one of 8-bit floats, one of which a tensor is packed."""
    import torch
    from damage import edit_config, edit_tensors
    from quantised_files import quantised_sources
    from safetensors.torch import load_file

    write_sources(here, CONFIGS["llama"], ("old", "packed"))
    torch.save(load_file(here / "old" / "model.safetensors"), here / "old" / "pytorch_model.bin")
    (here / "old" / "model.safetensors").unlink()
    edit_config(here / "packed", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 8})
    whole = {"dtype": torch.int32}
    added = {"qweight": torch.ones(32, 5, **whole), "qzeros": torch.ones(4, 5, **whole), "scales": torch.ones(4, 40)}
    name = "model.layers.0.mlp.up_proj."
    edit_tensors(here / "packed", lambda t: (t.pop(f"{name}weight"), t.update({name + key: value for key, value in added.items()})))
    quantised_sources(here)
    (here / "law").rename(here / "law-fp8")
    assert follow(DOCS / "how-to" / "other-forms.md", here, lambda command: _said(run, command)) == 3


def test_take_an_expert_out_runs(here: Path, run: Any) -> None:
    write_sources(here / "models", CONFIGS["llama"])
    assert follow(DOCS / "how-to" / "take-an-expert-out.md", here, lambda command: _said(run, command)) == 4


def test_from_mergekit_runs(here: Path, run: Any) -> None:
    write_sources(here, CONFIGS["llama"], ("seed", "code"))
    page = DOCS / "how-to" / "from-mergekit.md"
    assert follow(page, here, lambda command: _said(run, command)) == 1
    (here / "recipe.yaml").write_text(run("plan", "slerp.yml").out)
    assert run("recipe.yaml").status == 0


def _said(run: Any, command: str) -> str:
    result = run(*shlex.split(command)[1:])
    return str(result.err + result.out)


def test_resume_runs(here: Path, run: Any) -> None:
    write_sources(here / "models", CONFIGS["llama"], FOUR)
    (here / "recipe.yaml").write_text("method: btx\nsources: {seed: models/seed, code: models/code}\noutput: {path: out}\n")
    commands = [command for block in blocks(PAGES["docs/how-to/resume.md"]) for command, _ in block.commands]
    assert commands
    for command in commands:
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, f"{command}: {result.err}"


def test_aligning_vocabularies_runs(here: Path, run: Any) -> None:
    three(here / "models")

    def call(command: str) -> str:
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, f"{command}: {result.err}"
        return result.err + result.out

    assert follow(PAGES["docs/how-to/align-vocabularies.md"], here, call) == 3


RECIPE = re.compile(r"(# \w+\.yaml\n)?(method|ffn|rules|router|attention|shared|experts): ?")
RECIPES = [block for block in BLOCKS if RECIPE.match(block.text) and block.page not in FOLLOWED]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers and no numbers, enough to plan with; and beside it a hybrid."""
    folder = tmp_path_factory.mktemp("model")
    hybrid = {**CONFIGS["qwen3_5_text"], "num_hidden_layers": 8, "layer_types": None}
    write_checkpoint(folder / "hybrid", hybrid, lambda name, shape: None)
    return write_checkpoint(folder / "plain", {**CONFIGS["llama"], "num_hidden_layers": 8}, lambda name, shape: None)


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_recipes_shown_can_be_planned(block: Block, tmp_path: Path, model: Path) -> None:
    """Whole recipes, and parts of one in a recipe around them."""
    around = {} if "method:" in block.text else {"method": "bam", "sources": {name: name for name in FOUR}, "output": {"path": "out"}}
    recipe = {**around, **yaml.safe_load(block.text)}
    for source in recipe["sources"].values():
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model.with_name("hybrid") if block.page == "docs/how-to/hybrids.md" else model, tmp_path / source)
        (tmp_path / source / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_texts(tmp_path, FOUR)
    for name, text in recipe.get("router", {}).get("texts", {}).items():
        (tmp_path / text).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"{name}.txt", tmp_path / text)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    make_plan(load_recipe(tmp_path / "recipe.yaml"))


def test_there_are_recipes_to_plan() -> None:
    assert {block.page for block in RECIPES} >= {"README.md", "docs/explanation/recipe.md"}


def test_gates_in_sentences_are_gates() -> None:
    texts = [
        text
        for page in PAGES.values()
        for text in re.findall(r"`(?:ffn: )?(\{[^`]*(?:top_k|gate)[^`]*\})`", page.read_text(encoding="utf-8"))
    ]
    assert len(texts) > 5
    for text in texts:
        Ffn.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_shown_is_run(block: Block) -> None:
    assert block.page in FOLLOWED or pages.TITLE.match(block.text), f"{block}: a snippet that no test runs"


# ---- links, and the site -----------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = PAGES[page]
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"
        assert page in ("README.md", "CONTRIBUTING.md") or DOCS in found.parents, f"{page}: {target} is not in the site"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    made = {title["file"] for block in blocks(PAGES[page]) if (title := pages.TITLE.match(block.text)) and title["how"] is None}
    named = re.findall(
        r"`((?:bam_merge|tests|scripts|recipes|examples|benchmarks|docs)/[\w./-]*)`", PAGES[page].read_text(encoding="utf-8")
    )
    assert [file for file in named if file not in made and not (ROOT / file).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    def entries(item: Any) -> Iterator[str]:
        values = item.values() if isinstance(item, dict) else item
        for value in [item] if isinstance(item, str) else values:
            yield from [value] if isinstance(value, str) else entries(value)

    listed = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_pages_of_their_length() -> None:
    lengths = {page: len(path.read_text(encoding="utf-8").splitlines()) for page, path in PAGES.items()}
    assert lengths["README.md"] <= 160 and lengths["CONTRIBUTING.md"] <= 60, lengths
