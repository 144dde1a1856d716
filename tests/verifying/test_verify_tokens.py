"""Aligned vocabularies as merged: every row by hand, the tokenizer files, and what verification must catch of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from proofs import UNPROVED, Forger, failed
from safetensors.torch import save_file
from vocabularies import END, SETTINGS, UNION, entry, put, source, three, tokenizer_json, weights

import bam_merge
from bam_merge import MergeOptions
from bam_merge.architectures.tables import load_architecture
from bam_merge.planning import make
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan, moves_bytes
from bam_merge.publishing.publish import publish
from bam_merge.sources.tokenizers import alignment
from bam_merge.verifying.report import Report
from bam_merge.verifying.tokens import Tokens, own_rows, tokens_of
from bam_merge.verifying.verification import verify

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(recipe: Path) -> tuple[Path, Plan]:
    plan = plan_file(recipe)
    return publish(plan, None, UNPROVED), plan


def passed(folder: Path, plan: Plan | None = None) -> Report:
    report = verify(folder, plan)
    assert report.ok, failed(report)
    return report


def by_hand(tmp_path: Path, name: str, missing: str = "mean") -> dict[str, list[torch.Tensor]]:
    """The rows of each source for the tokens of UNION and the bases, from `three`."""
    rows = {source: weights(tmp_path / source)[name].double() for source in ("seed", "code", "law")}
    has: dict[int, dict[str, int]] = {number: dict.fromkeys(rows, number) for number in range(END)}
    has[UNION["<r0>"]] = dict.fromkeys(rows, END)
    has[UNION["<r1>"]] = {"seed": END + 1, "law": END + 1}
    has[UNION["<im_start>"]], has[UNION["<im_end>"]] = {"code": END + 1}, {"code": END + 2}
    has[UNION["<note>"]] = {"law": END + 2}
    result: dict[str, list[torch.Tensor]] = {source: [] for source in rows}
    for number in sorted(has):
        given = {of: rows[of][row] for of, row in has[number].items()}
        made = torch.stack(list(given.values())).mean(0) if missing == "mean" else torch.zeros(32, dtype=torch.float64)
        for of in rows:
            result[of].append(given.get(of, made))
    return result


@pytest.mark.parametrize("missing", ["mean", "zeros"])
@pytest.mark.parametrize("method", ["bam", "merge"])
def test_averages_are_right_for_every_token(method: str, missing: str, tmp_path: Path) -> None:
    folder, plan = merged(three(tmp_path, f"{{source: union, missing: {missing}, pad_to_multiple_of: 16}}", method=method))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 48
    for name in (EMBED, HEAD):
        wanted = torch.stack([torch.stack(rows) for rows in by_hand(tmp_path, name, missing).values()]).mean(0)
        found = weights(folder)[name]
        assert found.shape == (48, 32)
        torch.testing.assert_close(found[: len(wanted)].double(), wanted, rtol=1e-6, atol=1e-8)
        assert not found[40:].any()
        padding = weights(tmp_path / "code")[name][32:40] / (1 if missing == "mean" else 3)  # rows that code alone has
        torch.testing.assert_close(found[32:40], padding, rtol=1e-6, atol=1e-8)
    passed(folder, plan)
    passed(folder)


@pytest.mark.parametrize("family", ["llama_tied", "gpt_neox", "phi3", "cohere_qk_norm", "qwen3"])
def test_every_family_is_aligned(family: str, tmp_path: Path) -> None:
    folder, plan = merged(three(tmp_path, family=family))
    passed(folder, plan)
    assert load_architecture("bam").rows and plan.alignment is not None


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_that_only_move_are_moved_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    """NaN, minus zero and all: nothing is computed where each row is one of a source's."""
    recipe = three(tmp_path, "{missing: code}", "shared: {make: copy, from: law}", "llama", "merge", dtype=dtype)
    nan = {name: tensor.clone() for name, tensor in weights(tmp_path / "law").items()}
    bits = nan[EMBED].view(torch.int16 if dtype == "BF16" else torch.int32)
    bits[END + 2, 0], bits[0, 0] = -1, torch.iinfo(bits.dtype).min
    save_file(nan, tmp_path / "law/model.safetensors")
    plan = plan_file(recipe)
    step = next(step for step in plan.steps if step.name == EMBED)
    assert moves_bytes(step) and step.expression == f"law:{EMBED}[by token]"
    folder = publish(plan, None, MergeOptions(verify=False, allow_nonfinite=True))
    found, law, code, seed = (
        weights(path)[EMBED].view(bits.dtype) for path in (folder, tmp_path / "law", tmp_path / "code", tmp_path / "seed")
    )
    rows = [*law[: END + 2], code[END + 1], code[END + 2], law[END + 2], *law[END + 5 :]]
    assert torch.equal(found[: len(rows)], torch.stack(rows))
    assert torch.equal(found[32:], code[32:]) and torch.equal(found[24:32], code[24:32]) and seed.shape[0] == 32
    assert not failed(verify(folder, plan)).keys() & {"copies", "tokens", "companions"}


@pytest.mark.parametrize("name", ["seed", "code", "law"])
def test_a_source_computes_the_same_by_the_results_ids(name: str, tmp_path: Path) -> None:
    """The result is one source in the ids of a union: its logits are the source's, token by token."""
    recipe = three(tmp_path, "{source: union, pad_to_multiple_of: 16}", f"shared: {{make: copy, from: {name}}}", method="merge")
    folder, plan = merged(recipe)
    assert all(map(moves_bytes, plan.steps)) == (name == "seed")  # code lacks <r1>, law padding, which two others have
    tokens = {token: number for number, token in tokens_of(tmp_path / name).text.items()}  # type: ignore[union-attr]
    ids = {number: UNION.get(token, number) for token, number in tokens.items()}
    own = torch.tensor([[*range(len(tokens)), 3, END, END + 1, 4]])
    source_logits, logits = bam_merge.load_model(tmp_path / name)(own), bam_merge.load_model(folder)(own.clone().apply_(ids.__getitem__))
    assert logits.shape[-1] == 48
    assert torch.equal(logits[..., list(ids.values())], source_logits[..., list(ids)])
    passed(folder, plan)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    recipe = three(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.read_text().replace("{path: out}", f"{{path: out, dtype: {dtype}}}"))
    folder, plan = merged(recipe)
    wanted = torch.stack([torch.stack(rows) for rows in by_hand(tmp_path, EMBED).values()]).mean(0)
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-10
    torch.testing.assert_close(weights(folder)[EMBED][: len(wanted)].double(), wanted, rtol=unit, atol=1e-6)
    passed(folder, plan)


@pytest.mark.parametrize("make", ["linear, weights: {seed: 0.5, code: 0.25, law: 0.25}", "slerp, from: [seed, law], t: 0.3", "ties, density: 0.5, base: seed", "task_arithmetic, base: seed", "dare_ties, density: 0.5, base: seed"])  # fmt: skip
def test_every_method_takes_aligned_sources(make: str, tmp_path: Path) -> None:
    folder, plan = merged(three(tmp_path, text=f"rules: [{{roles: [embed, head], make: {make}}}]"))
    passed(folder, plan)


def test_perplexities_are_of_the_results_ids(tmp_path: Path) -> None:
    """A source scores a text of its own tokens by the result's ids as by its own."""
    pytest.importorskip("tokenizers")
    recipe = three(tmp_path)
    folder, plan = merged(recipe)
    text = tmp_path / "text.txt"
    text.write_text("<note>ab cd<r1>e f" * 40)
    (row,) = verify(folder, plan, [text]).perplexity
    (tmp_path / "alone.yaml").write_text(
        "method: merge\nsources: {law: law}\nexperts: [law]\nshared: {make: copy, from: law}\noutput: {path: alone}\n"
    )
    alone, single = merged(tmp_path / "alone.yaml")
    (own,) = verify(alone, single, [text]).perplexity
    score, expected = row["perplexity"]["law"], own["perplexity"]["law"]
    assert expected < score < expected * 45 / 24 * 1.1  # the result has more rows, so that its logarithms have more terms


def test_one_sources_tokenizer_and_rows(tmp_path: Path) -> None:
    recipe = three(tmp_path, "{source: code}", method="merge")
    put(tmp_path / "code", {"generation_config.json": {"eos_token_id": END + 2}, "chat_template.jinja": "<im_start>"})
    folder, plan = merged(recipe)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "code" / name).read_bytes()
    assert weights(folder)[EMBED].shape == (40, 32)
    mean = sum(weights(tmp_path / name)[EMBED][END].double() for name in ("seed", "code", "law")) / 3
    torch.testing.assert_close(weights(folder)[EMBED][END].double(), mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weights(folder)[EMBED][END + 1], weights(tmp_path / "code")[EMBED][END + 1], rtol=1e-6, atol=1e-8)
    passed(folder, plan)


def test_the_same_bytes_where_sources_agree(tmp_path: Path) -> None:
    for name in ("seed", "code", "law"):
        source(tmp_path, name, ["<r0>"], 32, len(name))
    plain, _ = merged(write_recipe(tmp_path, output="{path: plain}"))
    keyed, plan = merged(write_recipe(tmp_path, "tokenizer: {source: union}", output="{path: keyed}"))
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (plain / file).read_bytes() == (keyed / file).read_bytes()
    passed(keyed, plan)


# ---- the tokenizer files ---------------------------------------------------------------------------------------------------


def test_files_of_a_union(tmp_path: Path) -> None:
    recipe = three(tmp_path, "{source: union, chat_template: code}")
    put(
        tmp_path / "seed",
        {
            "chat_template.jinja": "seed's",
            "added_tokens.json": {"<r0>": END, "<r1>": END + 1},
            "special_tokens_map.json": {"bos_token": "<s>"},
        },
    )
    decoder = {str(END): entry(END, "<r0>") | {"id": ...}, str(END + 1): {"content": "<r1>"}}
    put(
        tmp_path / "seed",
        {
            "tokenizer_config.json": {
                **SETTINGS,
                "added_tokens_decoder": {key: {k: v for k, v in value.items() if k != "id"} for key, value in decoder.items()},
            }
        },
    )
    put(
        tmp_path / "code",
        {"tokenizer_config.json": {**SETTINGS, "chat_template": "{{ '<im_start>' }}", "additional_special_tokens": ["<im_start>"]}},
    )
    folder, plan = merged(recipe)
    documents = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {item["content"]: item["id"] for item in documents["tokenizer.json"]["added_tokens"]} == UNION
    assert all(item["special"] for item in documents["tokenizer.json"]["added_tokens"])
    assert documents["added_tokens.json"] == UNION
    assert {item["content"]: int(number) for number, item in documents["tokenizer_config.json"]["added_tokens_decoder"].items()} == UNION
    assert documents["tokenizer_config.json"]["chat_template"] == "{{ '<im_start>' }}" and not (folder / "chat_template.jinja").exists()
    assert documents["special_tokens_map.json"] == {"bos_token": "<s>", "additional_special_tokens": ["<im_start>"]}
    passed(folder, plan)


@pytest.mark.parametrize("beside", ["", "added_tokens.json", "tokenizer_config.json"])
def test_a_vocabulary_in_pieces(beside: str, tmp_path: Path) -> None:
    """Without tokenizer.json tokens stand in the file that names the seed's, or in a new one."""
    recipe = three(tmp_path)
    for name, added in (("seed", ["<r0>"]), ("code", ["<r0>", "<c>"]), ("law", ["<r0>"])):
        whole = tokenizer_json()["model"]
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).unlink()
        numbered = dict(zip(added, range(END, END + 9), strict=False)) if beside or name == "code" else {}
        put(tmp_path / name, {"vocab.json": whole["vocab"], "merges.txt": "#version: 0.2\na b\nc d\n"})
        if beside == "tokenizer_config.json":
            put(tmp_path / name, {beside: {"added_tokens_decoder": {str(n): {"content": token} for token, n in numbered.items()}}})
        elif numbered:
            put(tmp_path / name, {"added_tokens.json": numbered})
    folder, plan = merged(recipe)
    tokens = tokens_of(folder)
    assert tokens is not None and {tokens.text[END], tokens.text[END + 1]} == {"<r0>", "<c>"}
    assert (folder / "added_tokens.json").exists() == (beside != "tokenizer_config.json")
    assert (folder / "vocab.json").read_bytes() == (tmp_path / "seed/vocab.json").read_bytes()
    passed(folder, plan)


def test_a_chat_template_that_the_result_cannot_write(tmp_path: Path, run: Any) -> None:
    result = run("plan", three(tmp_path, "{source: union, chat_template: code}"))
    assert result.status == 2 and "tokenizer.chat_template: sources.code has no chat template." in result.err
    put(tmp_path / "code", {"chat_template.jinja": "<im_start>{{ x }}"})
    result = run("plan", three(tmp_path, "{source: seed, chat_template: code}"))
    assert (
        result.status == 2
        and "the template of sources.code has '<im_start>', no token of the result. Set tokenizer.source: union." in result.err
    )
    assert run("plan", three(tmp_path, "{source: union, chat_template: code}")).status == 0


def test_ids_of_settings_follow_their_tokens(tmp_path: Path) -> None:
    """code's tokenizer, and the seed's settings where code has none: <r0> has one id in both, <r1> is no token of code."""
    recipe = three(tmp_path, "{source: code}", method="merge")
    put(tmp_path / "seed", {"tokenizer.json": tokenizer_json(["<im_end>", "<r1>", "<r0>"])})
    settings = {
        "eos_token_id": [1, END],
        "pad_token_id": END + 1,
        "suppress_tokens": [END + 2, END + 1],
        "bad_words_ids": [[END], [END + 1]],
        "top_k": END,
    }
    put(
        tmp_path / "seed",
        {
            "generation_config.json": settings,
            "config.json": {**json.loads((tmp_path / "seed/config.json").read_text()), "eos_token_id": [1, END], "pad_token_id": END + 1},
        },
    )
    config = json.loads((tmp_path / "code/config.json").read_text())
    put(tmp_path / "code", {"config.json": {key: value for key, value in config.items() if key not in ("eos_token_id", "pad_token_id")}})
    folder, plan = merged(recipe)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [1, END + 2],
        "suppress_tokens": [END],
        "bad_words_ids": [[END + 2]],
        "top_k": END,
    }
    assert plan.config["eos_token_id"] == [1, END + 2] and "pad_token_id" not in plan.config and plan.config["bos_token_id"] == 1
    passed(folder, plan)
    forge = Forger(folder)
    forge.file("generation_config.json", json.dumps({"eos_token_id": [1, END]}))
    assert failed(verify(folder, plan)).keys() == {"companions"}


def test_what_ends_a_text_of_another_template(tmp_path: Path, run: Any) -> None:
    recipe = three(tmp_path, "{source: union, chat_template: code}")
    config = json.loads((tmp_path / "code/config.json").read_text())
    put(tmp_path / "code", {"chat_template.jinja": "<im_start>", "config.json": {**config, "eos_token_id": [2, END + 2]}})
    said = run("plan", recipe).out
    assert (
        f"sources.code ends a text with '<im_end>', the result does not: generation may need its id {END + 3} among eos_token_id." in said
    )
    assert said.count("ends a text") == 1


# ---- what must be caught ---------------------------------------------------------------------------------------------------


def tokenizer_of(forge: Forger, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((forge.folder / "tokenizer.json").read_text())
    change(document)
    forge.file("tokenizer.json", json.dumps(document, indent=2))


def swap_rows(forge: Forger, name: str = EMBED) -> None:
    rows = forge.read(name).clone()
    rows[[END + 2, END + 4]] = rows[[END + 4, END + 2]]
    forge.write(name, rows)


def swap_ids(document: dict[str, Any]) -> None:
    a, b = document["added_tokens"][-2:]
    a["content"], b["content"] = b["content"], a["content"]


SABOTAGE: dict[str, tuple[Callable[[Forger], Any], set[str]]] = {
    "one row swapped": (swap_rows, {"merges"}),
    "one row of the head swapped": (lambda forge: swap_rows(forge, HEAD), {"merges"}),
    "two tokens' ids swapped": (lambda forge: tokenizer_of(forge, swap_ids), {"tokens"}),
    "one token's id wrong": (lambda forge: tokenizer_of(forge, lambda d: d["added_tokens"][-1].update(id=END + 9)), {"tokens"}),
    "a token missing": (lambda forge: tokenizer_of(forge, lambda d: d["added_tokens"].pop()), {"tokens"}),
    "a token too many": (lambda forge: tokenizer_of(forge, lambda d: d["added_tokens"].append(entry(END + 5, "<x>"))), {"tokens", "companions"}),
    "a base piece renamed": (lambda forge: tokenizer_of(forge, lambda d: d["model"]["vocab"].update(zz=d["model"]["vocab"].pop("a"))), {"tokens", "companions"}),
    "another way to match": (lambda forge: tokenizer_of(forge, lambda d: d["added_tokens"][-1].update(lstrip=True)), {"companions"}),
    "another merge": (lambda forge: tokenizer_of(forge, lambda d: d["model"].update(merges=[])), {"companions"}),
    "no tokenizer": (lambda forge: forge.file("tokenizer.json", "{}"), {"tokens", "companions"}),
    "ids of no number": (lambda forge: tokenizer_of(forge, lambda d: d["added_tokens"][-1].update(id=-1)), {"tokens", "companions"}),
    "another setting": (lambda forge: forge.file("tokenizer_config.json", json.dumps({**SETTINGS, "bos_token": "</s>"})), {"companions"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_forged_result_is_found(name: str, tmp_path: Path) -> None:
    folder, plan = merged(three(tmp_path))
    forge, checks = SABOTAGE[name]
    forge(Forger(folder))
    for report in (verify(folder, plan), verify(folder)):
        assert failed(report).keys() >= checks and failed(report).keys() <= checks | {"companions"}, failed(report)


def wrong_padding(own: Any) -> Any:
    def rows(*arguments: Any) -> Any:
        table = own(*arguments)
        if len(table) == 40 and table[30] == 30:
            table[30] = 31
        return table

    return rows


def wrong_donor(filled: Any) -> Any:
    def of(missing: str, name: str, own: Any) -> Any:
        return filled("zeros" if name == "law" else missing, name, own)

    return of


def wrong_token(own: Any) -> Any:
    def rows(*arguments: Any) -> Any:
        table = own(*arguments)
        if table[END + 1] == END + 1:
            table[END + 1] = END
        return table

    return rows


@pytest.mark.parametrize(("function", "fault"), [("_own_rows", wrong_padding), ("_filled", wrong_donor), ("_own_rows", wrong_token)])
def test_a_plan_that_aligns_wrongly_is_found(function: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What carries the plan out, and what compares with it, follow it; only verification's own reading of the tokenizers does not."""
    recipe = three(tmp_path)
    right = plan_file(recipe)
    monkeypatch.setattr(alignment, function, fault(getattr(alignment, function)))
    plan = plan_file(recipe)
    assert [step.expr for step in plan.steps] != [step.expr for step in right.steps]
    report = verify(publish(plan, None, UNPROVED), plan)
    assert failed(report).keys() == {"tokens"}
    assert "in the plan, by the tokenizers" in failed(report)["tokens"]


def test_a_tokenizer_that_changed_since_is_no_fault_of_the_result(tmp_path: Path) -> None:
    folder, _ = merged(three(tmp_path))
    put(tmp_path / "law", {"tokenizer.json": tokenizer_json(["<r0>", "<other>", "<note>"])})
    report = verify(folder)
    assert report.ok, failed(report)
    (said,) = (check.detail for check in report.checks if check.name == "sources")
    assert "changed since the merge, so digests only: law/tokenizer.json, by which tokens were aligned" in said


def test_a_resumed_merge_sees_that_a_tokenizer_changed(tmp_path: Path, run: Any) -> None:
    recipe = three(tmp_path)
    first = plan_file(recipe).fingerprint
    put(tmp_path / "law", {"tokenizer.json": tokenizer_json(["<r0>", "<other>", "<note>"])})
    assert plan_file(recipe).fingerprint != first
    assert make.load_architecture("bam").name == "bam"


def test_two_readings_of_a_table() -> None:
    """verifying/tokens.py by hand: a moved token, one that is missing, padding."""
    result = Tokens({0: "a", 1: "<x>", 2: "<y>"}, frozenset({1, 2}))
    assert own_rows(result, Tokens({0: "a", 1: "<y>"}, frozenset({1})), 5, 5).tolist() == [0, -1, 1, 3, 4]
    assert own_rows(result, Tokens({0: "a", 1: "<y>"}, frozenset({1})), 2, 3).tolist() == [0, -1, 1]
