"""--force: what it replaces, what it refuses to, and what it keeps of what appears meanwhile. Paths nobody can mean."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from planting import Victim
from runs import Stop, folder_bytes, options
from runs import plan as plan  # a fixture

from bam_merge import MergeOptions
from bam_merge.errors import OutputError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing import publish as publish_module
from bam_merge.publishing import renaming
from bam_merge.publishing.publish import publish
from bam_merge.publishing.replacing import SAVED, why_kept
from bam_merge.publishing.staging import Staging

MODEL = '{"model_type": "llama"}'


def old_model(target: Path) -> Path:
    """What save_pretrained leaves, and no trace of bam-merge."""
    target.mkdir()
    (target / "config.json").write_text(MODEL)
    (target / "model.safetensors").write_bytes(b"old weights")
    return target


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("pattern", SAVED)
def test_what_savers_write_is_replaced(pattern: str, llamas: Path) -> None:
    """Every row of the table, beside a model; and what is almost one is not."""
    target = old_model(llamas / "out")
    name = pattern.replace("#", "7").replace("*", "rag")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text({"README.md": "---\nlicense: mit\n---\n"}.get(name, MODEL))
    why, found = why_kept(target)
    assert (why, found.foreign) == (None, ())
    assert name in found.saved
    for other in (f"{name}.orig", f"my-{name}" if "/" not in name else "additional_chat_templates/x.py"):
        (target / other).write_text(MODEL)
        assert other in (why_kept(target)[0] or ""), other
        (target / other).unlink()
    (target / name).unlink()
    (target / name).symlink_to(llamas / "seed" / "model.safetensors")
    assert name in (why_kept(target)[0] or "") or name == "config.json", "a link was somebody's own doing"


def test_what_transformers_saves_is_replaced(llamas: Path) -> None:
    """A model in shards and a tokenizer with several templates, as save_pretrained writes them here."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    target = llamas / "out"
    config = transformers.LlamaConfig(**{key: value for key, value in CONFIGS["llama"].items() if key != "model_type"})
    transformers.LlamaForCausalLM(config).save_pretrained(target, max_shard_size="40kB")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(target)
    why, found = why_kept(target)
    assert (why, found.foreign) == (None, ())
    assert {
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    } <= found.saved.keys()


def put(target: Path, name: str) -> None:
    """An entry of that name, a folder with something in it when it ends in a slash."""
    if name.endswith("/"):
        (target / name).mkdir()
        (target / name / "work").write_text("years")
    else:
        (target / name).write_text("years")


FOREIGN = [
    ".git/", ".gitignore", ".env", ".cache/", "thesis.tex", "checkpoint-500/", "runs/", "logs.txt", "train.py", "modeling_mine.py", "notes.md",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "data.jsonl", "model.safetensors.bak", "model-1-of-2.safetensors",
    "adapter_model.safetensors", "model-Q4_K_M.gguf", "original/", "onnx/", "results.json", "config.json~", "Config.json", "recipe.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_foreign_is_named_and_refused(plan: Plan, llamas: Path, name: str) -> None:
    """Beside a whole model, in a target that bam-merge wrote or not."""
    target = old_model(llamas / "out")
    put(target, name)
    before = tree(target)
    with pytest.raises(OutputError) as caught:
        publish(plan, None, MergeOptions(force=True, verify=False))
    said = str(caught.value)
    assert said.startswith(f"{target} exists and holds what neither bam-merge nor save_pretrained writes: {name}. --force would delete")
    assert "move it elsewhere, or choose another --output" in said
    assert tree(target) == before
    assert not (llamas / ".out.bam-merge").exists()


def test_all_that_is_foreign_is_named_shortened(plan: Plan, llamas: Path) -> None:
    target = publish(plan, None, MergeOptions(verify=False))
    for name in (".git/", "thesis.tex", "x" * 200, "esc\x1b[31m", *(f"note-{n:02}.md" for n in range(30))):
        put(target, name)
    with pytest.raises(OutputError) as caught:
        publish(plan, None, MergeOptions(force=True, verify=False))
    said = str(caught.value)
    assert "writes: .git/, esc\\x1b[31m, note-00.md, " in said
    assert "and 14 more. " in said
    assert "\x1b" not in said
    assert len(said) < 700
    assert (target / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(("readme", "foreign"), [("---\nlicense: mit\n---\n# A model", False), ("# My thesis", True), ("", False)])
def test_a_model_card_is_told_from_another_text(llamas: Path, readme: str, foreign: bool) -> None:
    target = old_model(llamas / "out")
    (target / "README.md").write_text(readme)
    assert ("README.md" in (why_kept(target)[0] or "")) == foreign


@pytest.mark.parametrize(("config", "foreign"), [
    (MODEL, False), ('{"architectures": ["X"]}', False), ('{"model_type": "ll', False), ("old", False),
    ('{"server": {"port": 80}}', True), ("[]", True), ('{"name": "my-app", "model": "x"}', True),
])  # fmt: skip
def test_another_programs_config_json_is_no_models(plan: Plan, llamas: Path, config: str, foreign: bool) -> None:
    """A damaged one is replaced, for that is what one wants to do with it."""
    (llamas / "out").mkdir()
    (llamas / "out" / "config.json").write_text(config)
    if not foreign:
        assert publish(plan, None, MergeOptions(force=True, verify=False)).is_dir()
        return
    with pytest.raises(OutputError, match=r"is not a checkpoint folder.*It holds what .* writes: config\.json\."):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert (llamas / "out" / "config.json").read_text() == config


@pytest.mark.parametrize("layout", ["bam", "mixtral", "qwen2_moe"])
def test_what_bam_merge_writes_is_in_the_table(llamas: Path, layout: str) -> None:
    """In every layout, with all the companions that a seed can have: its own result can always be replaced."""
    from bam_merge.checkpoints.folder import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if name.endswith((".txt", ".jinja", ".model")):
            (llamas / "seed" / name).write_text("one\n")
    recipe = write_recipe(
        llamas, method="bam" if layout == "bam" else "btx", output=f"{{path: out, layout: {layout}, max_shard_size: 60kB}}"
    )
    target = publish(plan_file(recipe), None, MergeOptions(verify=False))
    why, found = why_kept(target)
    assert (why, found.foreign) == (None, ())
    assert found.saved.keys() == {path.name for path in target.iterdir()}


@pytest.mark.parametrize("kind", ["a symbolic link", "a file", "a FIFO"])
def test_only_a_folder_is_replaced(plan: Plan, llamas: Path, kind: str) -> None:
    target = llamas / "out"
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a FIFO":
        os.mkfifo(target)
    else:
        target.symlink_to(old_model(llamas / "real"))
    with pytest.raises(OutputError, match=rf"out exists and is {kind}, and --force replaces nothing but a folder"):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert os.path.lexists(target)


def test_a_folder_that_cannot_be_written_in_is_refused_before_the_merge(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rename would be refused after it."""
    target = old_model(llamas / "out")
    target.chmod(0o555)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target and real(path, mode))  # as for who is not root
    with pytest.raises(OutputError, match=r"out exists and is not yours to write in \(mode 0555, of .*\), so --force will not delete it"):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert len(tree(target)) == 2


def test_a_file_that_cannot_be_deleted_is_said(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new model is published all the same, and the next run goes on."""
    old_model(llamas / "out")
    real = os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if path == "config.json":
            raise OSError(13, "Permission denied")
        real(path, **options)

    settings, said = options(force=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        publish(plan, None, settings)
    assert said == [f"{llamas}/.out.bam-merge could not be deleted whole (Permission denied). Nothing uses what is left of it."]
    assert os.listdir(llamas / ".out.bam-merge" / "output") == ["config.json"]
    publish(plan, None, MergeOptions(force=True, verify=False))
    assert not (llamas / ".out.bam-merge").exists()


# ---- what appears between the check and the replacement ---------------------------------------------------------------------------


def before_the_exchange(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    real = renaming._rename

    def late(old: Any, new: Any, flags: int) -> bool:
        monkeypatch.setattr(renaming, "_rename", real)
        act()
        return real(old, new, flags)

    monkeypatch.setattr(renaming, "_rename", late)


@pytest.mark.parametrize("plain", [False, True], ids=["exchanged", "plain rename"])
def test_what_appears_after_the_check_is_kept(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    """Foreign names, and a file of a saver's name that is not the one that was checked."""
    target = old_model(llamas / "out")
    (llamas / "out.kept").write_text("taken")

    def act() -> None:
        put(target, "thesis.tex")
        put(target, "checkpoint-500/")
        (target / "model.safetensors").write_bytes(b"weights that somebody just saved")
        if plain:
            monkeypatch.setattr(renaming, "_rename", lambda *args: False)

    before_the_exchange(monkeypatch, act)
    settings, said = options(force=True)
    if plain:
        real = renaming._plain_rename
        monkeypatch.setattr(renaming, "_rename", lambda *args: False)
        monkeypatch.setattr(renaming, "_plain_rename", lambda *args: (act(), real(*args)))
    new = publish(plan, None, settings)
    kept = llamas / "out.kept-2"
    assert tree(kept) == {
        "thesis.tex": b"years", "checkpoint-500/work": b"years", "model.safetensors": b"weights that somebody just saved",
    }  # fmt: skip
    assert "bam_merge.json" in tree(new)
    assert said[-1] == (
        "checkpoint-500, model.safetensors, thesis.tex: not a saved model's, or not there when the folder that was replaced was checked; "
        f"kept in {kept}."
    )
    assert not (llamas / ".out.bam-merge").exists()
    assert (llamas / "out.kept").read_text() == "taken"


def test_a_folder_exchanged_for_another_after_the_check_is_kept_whole(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_model(llamas / "out")

    def act() -> None:
        target.rename(llamas / "moved")
        old_model(target)

    before_the_exchange(monkeypatch, act)
    publish(plan, None, MergeOptions(force=True, verify=False))
    assert tree(llamas / "out.kept") == tree(llamas / "moved") == {"config.json": MODEL.encode(), "model.safetensors": b"old weights"}


def test_a_target_that_appears_after_the_check_is_not_replaced(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was nothing to replace when it was looked at."""
    before_the_exchange(monkeypatch, lambda: old_model(llamas / "out"))
    with pytest.raises(OutputError, match=r"out appeared while the merge ran\. Nothing was replaced"):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert tree(llamas / "out") == {"config.json": MODEL.encode(), "model.safetensors": b"old weights"}


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_foreign_in_a_killed_runs_leftovers_is_kept(
    plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """The run had exchanged the folders and was killed before it looked at the old one again."""
    target = old_model(llamas / "out")

    def killed(staging: Staging, target: Path) -> None:
        raise Stop

    before_the_exchange(monkeypatch, lambda: put(target, "thesis.tex"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(publish_module, "_make_durable", killed)
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert (llamas / ".out.bam-merge" / "output" / "thesis.tex").exists()
    settings, said = options(force=True, resume=resume)
    publish(plan, None, settings)
    assert tree(llamas / "out.kept") == {"thesis.tex": b"years"}
    assert (
        f"thesis.tex: not a saved model's, or not there when the folder that was replaced was checked; kept in {llamas}/out.kept." in said
    )
    assert not (llamas / ".out.bam-merge").exists()


def test_links_in_the_old_folder_lead_to_no_deletion(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of templates is exchanged for a link to somebody's, after the check."""
    victim = Victim.make(llamas / "victim")
    (victim.folder / "inside" / "rag.jinja").write_text("{{ mine }}")
    target = old_model(llamas / "out")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("{{ old }}")
    before = victim.state()

    def act() -> None:
        shutil.rmtree(target / "additional_chat_templates")
        (target / "additional_chat_templates").symlink_to(victim.folder / "inside")

    before_the_exchange(monkeypatch, act)
    publish(plan, None, MergeOptions(force=True, verify=False))
    assert victim.state() == before
    assert (llamas / "out.kept" / "additional_chat_templates").is_symlink()


def test_folders_of_templates_are_replaced_whole(plan: Plan, llamas: Path) -> None:
    target = old_model(llamas / "out")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("{{ old }}")
    settings, said = options(force=True)
    publish(plan, None, settings)
    assert sorted(os.listdir(llamas)) == ["code", "law", "out", "recipe.yaml", "seed"]
    assert said == []


# ---- paths that nobody can mean ------------------------------------------------------------------------------------------------


def test_places_that_are_never_replaced(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    home = old_model(llamas / "home")
    here = old_model(llamas / "here")
    (here / "additional_chat_templates").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here / "additional_chat_templates")
    recipe = llamas / "recipe.yaml"
    cases = {
        "/": "/ is the root of the file system", ".": f"{here}/additional_chat_templates is the working directory",
        "..": f"{here} is a folder above the working directory", str(home): f"{home} is your home folder", "~": f"{home} is your home folder",
        "/proc": "/proc is a mount point", "./": f"{here}/additional_chat_templates is the working directory",
    }  # fmt: skip
    for output, message in cases.items():
        for force in ([], ["--force"], ["--dry-run"]):
            result = run(recipe, "--output", output, *force)
            assert result.status == 2, output
            assert result.err.startswith(f"error: {message}, which is never replaced. Name a new folder, as in --output out."), result.err
    assert tree(home) == tree(here) == {"config.json": MODEL.encode(), "model.safetensors": b"old weights"}


def test_a_folder_above_a_source_is_refused(plan: Plan, llamas: Path, run: Any) -> None:
    with pytest.raises(OutputError, match=r"is, or holds, sources\.seed"):
        publish(plan, llamas, MergeOptions(force=True, verify=False))
    recipe = write_recipe(llamas, output="{path: seed/out}")
    for arguments in ((recipe,), ("plan", recipe), ("plan", recipe, "--json")):
        result = run(*arguments)
        assert result.status == 2
        assert f"error: output.path: {llamas}/seed/out is inside sources.seed" in result.err


@pytest.mark.parametrize("arguments", [
    ("merge", ""), ("R", "--output", ""), ("R", "--output="), ("plan", ""), ("inspect", ""), ("verify", ""), ("demo", ""),
    ("verify", "R", "--recipe", ""), ("verify", "R", "--text", ""), ("diff", "", "R"), ("diff", "R", ""), ("diff", "--seed", "", "R"),
    ("diff", "R", "R", "--html", ""),
])  # fmt: skip
def test_empty_paths_are_usage_errors(arguments: tuple[str, ...], llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the working directory, which they would mean to the system."""
    monkeypatch.chdir(llamas)
    recipe = str(write_recipe(llamas))
    before = tree(llamas)
    result = run(*(recipe if argument == "R" else argument for argument in arguments))
    assert result.status == 2
    assert "'': an empty path; write . for the folder itself." in result.err
    assert result.out == ""
    assert tree(llamas) == before


def test_an_empty_output_of_the_python_interface(plan: Plan) -> None:
    with pytest.raises(OutputError, match="'': an empty path"):
        publish(plan, "", MergeOptions(force=True, verify=False))


def test_home_is_where_the_tilde_leads(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, where the shell does not expand it after =; a folder that is really named ~ is ./~."""
    home = llamas / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(llamas)
    recipe = write_recipe(llamas).rename(llamas / "home" / "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("{seed: seed, code: code, law: law}", "{seed: ../seed, code: ../code, law: ../law}"))
    assert run("plan", "~/recipe.yaml").status == 0
    assert run("~/recipe.yaml", "--no-verify").out.startswith(f"{home}/out: ")
    assert run("~/recipe.yaml", "--output=~/b", "--no-verify").out.startswith(f"{home}/b: ")
    assert run("inspect", "~/out").status == run("diff", "~/out", "~/b", "--html=~/page.html").status == 0
    assert (home / "page.html").exists()
    assert run("diff", "--seed", "~/../seed", "~/../law").status == 1
    assert run("verify", "~/out", "--recipe", "~/recipe.yaml").status == 0
    assert not any(path.name == "~" for path in llamas.rglob("*"))
    assert run("~/recipe.yaml", "--output", "./~", "--no-verify").status == run("inspect", "./~").status == 0
    assert (llamas / "~" / "config.json").exists()
    result = run("~/recipe.yaml", "--output", "~nobody-of-that-name/out")
    assert (result.status, "~nobody-of-that-name" in result.err) == (2, True)


# ---- the demo --------------------------------------------------------------------------------------------------------------------


def test_the_demo_deletes_what_it_wrote_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.demo import demo

    monkeypatch.setattr(demo, "CONFIG", CONFIGS["llama"])
    folder = tmp_path / "demo"
    demo.make_demo(folder)
    before = tree(folder / "seed")
    (folder / "code" / "thesis.tex").write_text("years")
    shutil.rmtree(folder / "law")
    (folder / "law").symlink_to(old_model(tmp_path / "mine"))
    with pytest.raises(OutputError) as caught:
        demo.make_demo(folder, force=True)
    assert [problem.split(". ")[0] for problem in caught.value.problems] == [
        f"{folder}/code exists and holds what neither bam-merge nor save_pretrained writes: thesis.tex",
        f"{folder}/law exists and is a symbolic link, and --force replaces nothing but a folder",
    ]
    assert tree(folder / "seed") == before
    assert tree(tmp_path / "mine")["model.safetensors"] == b"old weights"
    (folder / "code" / "thesis.tex").unlink()
    (folder / "law").unlink()
    demo.make_demo(folder, force=True)
    assert tree(folder / "seed") == before
    assert sorted(os.listdir(folder)) == ["code", "law", "math", "recipe.yaml", "seed"]


def test_sources_of_their_own_are_left_alone(tmp_path: Path, run: Any) -> None:
    """A model of the name that the result has, as a source of the next merge."""
    write_sources(tmp_path, CONFIGS["llama"])
    recipe = write_recipe(tmp_path, output="{path: seed}")
    before = folder_bytes(tmp_path / "seed")
    result = run(recipe, "--force")
    assert result.status == 2
    assert "seed is, or holds, sources.seed" in result.err
    assert folder_bytes(tmp_path / "seed") == before
