"""The model card: front matter that the hub reads, licenses where all sources agree, engines by the tables, and the recipe, to be run again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions, load_recipe, merge, verify
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.planning.card import Beside, has_chat_template, model_card
from bam_merge.planning.make import make_plan, plan_file
from bam_merge.recipe.places import Known
from bam_merge.sources.licenses import License, read_license

QUICK = MergeOptions(verify="none")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MIT_TEXT = "MIT License\n\nCopyright (c) Somebody\n"
APACHE_TEXT = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


def front_matter(card: str) -> dict[str, Any]:
    """Of a card, by PyYAML."""
    return dict(yaml.safe_load(card.split("---\n")[1]))


def made(folder: Path, text: str = "", method: str = "bam", output: str = "{path: out}") -> Path:
    return merge(load_recipe(write_recipe(folder, text, method, output=output)), options=QUICK)


def state(folder: Path, *licenses: str | None) -> None:
    """Cards of seed, code and law that state these licenses."""
    for name, text in zip(("seed", "code", "law"), licenses, strict=True):
        if text is not None:
            (folder / name / "README.md").write_text(f"---\n{text}\n---\n# {name}\n")


# ---- licenses


@pytest.mark.parametrize(("files", "expected"), [
    ({"README.md": "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model"}, License("apache-2.0")),
    ({"README.md": "---\r\nlicense: 'MIT'  # ours\r\n---\r\n"}, License("mit")),
    ({"README.md": "\ufeff---\nlicense: mit\n---"}, License("mit")),
    ({"README.md": "---\nlicense:\n- cc-by-4.0\nlanguage: en\n---\n"}, License("cc-by-4.0")),
    ({"README.md": "---\ndate: 2024-01-01\nlicense: gemma\nother: {a: {b: &c d}, e: *c}\n---\n"}, License("gemma")),
    ({"README.md": "---\nlicense: other\nlicense_name: my licence\nlicense_link: https://example.org/LICENSE\n---\n"}, License("other", "my licence", "https://example.org/LICENSE")),
    ({"README.md": "---\nlicense: other\nlicense_link: https://user:hf_secret@example.org/x?token=1\n---\n"}, License("other")),
    ({"README.md": "---\nlicense: other\nlicense_link: LICENSE\n---\n"}, License("other")),
    ({"LICENSE": MIT_TEXT}, License("mit")),
    ({"LICENSE.txt": APACHE_TEXT}, License("apache-2.0")),
    ({"README.md": "# no front matter\nlicense: mit\n", "LICENSE": APACHE_TEXT}, License("apache-2.0")),
    ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": MIT_TEXT}, License("mit")),
    ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": APACHE_TEXT}, None),
    ({"README.md": "---\nlicense: mit\nlicense: apache-2.0\n---\n"}, None),
    ({"README.md": "---\nlicense: [mit, apache-2.0]\n---\n"}, None),
    ({"README.md": "---\nlicense: 'mit\\nbase_model: x'\n---\n"}, None),
    ({"README.md": "---\nlicense: <script>\n---\n"}, None),
    ({"README.md": "---\nlicense: true\n---\n"}, None),
    ({"README.md": "---\nlicense: {\n---\n"}, None),
    ({"README.md": "---\nnested:\n  license: mit\n---\n"}, None),
    ({"README.md": "---\nlicense: mit\n# and no end"}, None),
    ({"LICENSE": "All rights reserved."}, None),
    ({}, None),
])  # fmt: skip
def test_the_license_of_a_folder(files: dict[str, str], expected: License | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="")
    assert read_license(tmp_path) == expected


def test_a_license_is_not_read_of_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    (tmp_path / "LICENSE").write_bytes(b"\xff MIT License")
    (tmp_path / "LICENSE.txt").write_bytes(b"MIT License" + b" " * 2**20)
    assert read_license(tmp_path) is None


@pytest.mark.parametrize(("stated", "expected"), [
    (("license: mit", "license: mit", "license: mit"), {"license": "mit"}),
    (("license: mit", "license: mit", None), {}),
    (("license: mit", "license: mit", "license: apache-2.0"), {}),
    (("license: other\nlicense_name: a", "license: other\nlicense_name: a", "license: other\nlicense_name: b"), {}),
    (("license: other\nlicense_name: a",) * 3, {"license": "other", "license_name": "a"}),
    ((None, None, None), {}),
])  # fmt: skip
def test_a_license_only_where_all_sources_agree(stated: tuple[str | None, ...], expected: dict[str, str], llamas: Path) -> None:
    state(llamas, *stated)
    folder = made(llamas)
    card = (folder / "README.md").read_text()
    found = front_matter(card)
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    row = next(line for line in card.splitlines() if line.startswith("| licenses |"))
    assert all(f"{name}: " in row for name in ("seed", "code", "law")) or row == "| licenses | no source states one |"
    report = verify(folder)
    assert report.ok, list(report.failures)
    assert next(check for check in report.checks if check.name == "card").ok


def test_every_folder_that_is_read_must_agree(llamas: Path) -> None:
    """A base that is no source, and an adapter, have licenses too."""
    recipe = load_recipe(write_recipe(llamas))
    plan = make_plan(recipe)
    card = model_card(plan, Beside({"seed": License("mit"), "code": License("mit")}))
    assert "license" not in front_matter(card)
    assert "| licenses | seed: mit, code: mit, law: not stated |" in card


def test_what_changes_of_a_license_is_said_and_what_is_forged_fails(llamas: Path) -> None:
    state(llamas, *["license: cc-by-nc-4.0"] * 3)
    folder = made(llamas)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["sources"]["code"]["license"] == "cc-by-nc-4.0"
    (llamas / "code" / "README.md").write_text("---\nlicense: mit\n---\n")
    report = verify(folder)
    card = next(check for check in report.checks if check.name == "card")
    assert (report.ok, card.ok) == (True, None)
    assert "sources.code states mit now, cc-by-nc-4.0 by the manifest" in card.detail
    state(llamas, *["license: cc-by-nc-4.0"] * 3)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("cc-by-nc-4.0", "mit"))
    assert {check.name for check in verify(folder).failures} == {"files", "card"}


# ---- what the hub reads


def test_front_matter_of_folders(llamas: Path) -> None:
    found = front_matter((made(llamas) / "README.md").read_text())
    assert found == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["merge", "bam-merge", "moe"]}
    dense = front_matter((made(llamas, method="merge", output="{path: dense}") / "README.md").read_text())
    assert dense["tags"] == ["merge", "bam-merge"]


def test_base_models_are_the_sources_of_the_hub_and_no_folder(llamas: Path) -> None:
    (llamas / "org").mkdir()
    (llamas / "seed").rename(llamas / "org" / "name")
    path = llamas / "recipe.yaml"
    path.write_text("method: bam\nsources: {seed: org/name, code: code, law: law}\noutput: {path: out}\n")
    assert "base_model" not in front_matter(model_card(plan_file(path)))
    plan = plan_file(path)
    known = {"code": Known(f"team/code@{COMMIT}", llamas / "code"), "law": Known(f"team/law@{COMMIT}", llamas / "law")}
    object.__setattr__(plan, "recipe", plan.recipe.knowing(known))
    found = front_matter(model_card(plan))
    assert found["base_model"] == ["team/code", "team/law"]
    assert found["base_model_relation"] == "merge"


def test_front_matter_as_huggingface_hub_reads_it(llamas: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    state(llamas, *["license: mit"] * 3)
    data = hub.ModelCard((made(llamas) / "README.md").read_text()).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert hub.ModelCard.load(llamas / "seed" / "README.md").data.license == "mit"


# ---- engines


@pytest.mark.parametrize(("family", "layout", "gate", "serves", "refuses"), [
    ("llama", "mixtral", "topk_then_softmax", ["vllm serve", "convert_hf_to_gguf.py"], []),
    ("qwen3", "qwen3_moe", "topk_then_softmax", ["vllm serve", "convert_hf_to_gguf.py"], []),
    ("qwen3", "qwen3_moe", "softmax_then_topk", ["vllm serve"], ["Not in llama.cpp", "norm_topk_prob is False"]),
    ("qwen2", "qwen2_moe", "softmax_then_topk", ["vllm serve", "convert_hf_to_gguf.py"], []),
    ("qwen2", "qwen2_moe", "topk_then_softmax", ["vllm serve"], ["Not in llama.cpp", "norm_topk_prob is True"]),
    ("mistral", "mixtral", "topk_then_softmax", ["vllm serve"], ["Not in llama.cpp", "those in the window"]),
    ("qwen3_biased", "qwen3_moe", "topk_then_softmax", [], ["Not in llama.cpp", "Not in vLLM", "attention_out_bias is True"]),
    ("llama", "bam", "topk_then_softmax", ["vllm serve"], ["Not in llama.cpp", "it knows no such architecture"]),
    ("gpt_neox", "bam", "topk_then_softmax", [], ["Not in vLLM", "hidden_act is gelu", "gated_ffn is False", "mlp_bias is True"]),
])  # fmt: skip
def test_engines_are_named_where_they_compute_the_model(
    family: str, layout: str, gate: str, serves: list[str], refuses: list[str], tmp_path: Path
) -> None:
    write_sources(tmp_path, CONFIGS[family])
    plan = plan_file(write_recipe(tmp_path, f"ffn: {{gate: {gate}}}", "btx", output=f"{{path: out, layout: {layout}}}"))
    card = model_card(plan)
    assert [text for text in ("vllm serve", "convert_hf_to_gguf.py") if text in card] == serves
    assert all(text in card for text in refuses), card
    assert ("Not in" in card) == any("Not in" in text for text in refuses)
    assert ("--trust-remote-code" in card) == (layout == "bam" and bool(serves))


# ---- the recipe, and the same bytes


def test_the_recipe_in_the_card_makes_the_same_folder(llamas: Path) -> None:
    folder = made(llamas, "rules: [{roles: [norm.*], make: copy, from: seed}]\nffn: {top_k: 2}")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (llamas / "again.yaml").write_text(text.replace("path: out,", "path: other/../out2,"))
    second = {path.name: path.read_bytes() for path in merge(load_recipe(llamas / "again.yaml"), options=QUICK).iterdir()}
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["README.md"].replace(b"path: out,", b"") == second["README.md"].replace(b"path: out2,", b"")


def test_nothing_in_a_recipe_closes_its_fence(llamas: Path) -> None:
    """A folder may have any name, also one with backticks."""
    odd = "a```b"
    (llamas / "code").rename(llamas / odd)
    path = llamas / "recipe.yaml"
    path.write_text(f"method: bam\nsources: {{seed: seed, code: '{odd}', law: law}}\noutput: {{path: out}}\n")
    card = model_card(plan_file(path))
    (text,) = re.findall(r"^````yaml\n(.*?)^````$", card, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(text)["sources"]["code"] == odd


def test_the_same_inputs_give_the_same_card(llamas: Path) -> None:
    state(llamas, *["license: mit"] * 3)
    one = (made(llamas) / "README.md").read_bytes()
    two = (made(llamas, output="{path: ./out/../out3}") / "README.md").read_bytes()
    assert one.replace(b"path: out,", b"") == two.replace(b"path: out3,", b"")


@pytest.mark.parametrize(("documents", "expected"), [
    ({}, False),
    ({"tokenizer_config.json": b"{}"}, False),
    ({"tokenizer_config.json": b'{"chat_template": null}'}, False),
    ({"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}, True),
    ({"tokenizer_config.json": b"[]"}, False),
    ({"tokenizer_config.json": b"{"}, False),
    ({"chat_template.jinja": b"x"}, True),
    ({"chat_template.json": b"{}"}, True),
])  # fmt: skip
def test_chat_templates_are_seen(documents: dict[str, bytes], expected: bool) -> None:
    assert has_chat_template(documents) is expected
