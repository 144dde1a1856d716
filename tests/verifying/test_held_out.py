"""The report on held-out text: figures by another way than they were made, planted faults of routers and experts, and words for each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, Forger
from word_texts import random_ids, words_tokenizer, write_words

from bam_merge import load_model
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import open_model
from bam_merge.model.routes import Choices
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.heldout import HeldOut, Routed, batches_of, read_domains
from bam_merge.verifying.router_words import readings
from bam_merge.verifying.verification import verify

LOUD = "router: {init: normal, std: 0.5}"
NAMES = ("seed", "code", "law")


def merged(folder: Path, text: str = LOUD, method: str = "bam") -> Any:
    write_sources(folder, CONFIGS["llama"])
    words_tokenizer(folder / "seed")
    plan = plan_file(write_recipe(folder, text, method))
    return publish(plan, None, UNPROVED), plan


def domains(folder: Path, **counts: int) -> dict[str, str]:
    """Random words for each domain."""
    return {
        name: str(write_words(folder / f"{name}.txt", random_ids(count, seed)))
        for seed, (name, count) in enumerate(counts.items(), start=5)
    }


@pytest.mark.parametrize("method", ["bam", "btx"])
def test_figures_are_those_of_whole_models(method: str, tmp_path: Path) -> None:
    """Accuracy, load, windows and entropy from gates that the whole model records; perplexities of the whole model with a forced expert."""
    folder, plan = merged(tmp_path, f"{LOUD}\nffn: {{top_k: 2, gate: topk_then_softmax}}", method)
    texts = domains(tmp_path, code=600, law=300)
    report = verify(folder, plan, domains=texts)
    assert report.held_out is not None
    model = load_model(folder)
    assert [row["domain"] for row in report.held_out["texts"]] == ["code", "law"]
    assert report.held_out["chance"] == pytest.approx(1 / 3)
    for place, (name, expert) in enumerate((("code", 1), ("law", 2))):
        ids = [int(word[1:]) for word in Path(texts[name]).read_text().split()]
        windows = [ids[at : at + 256] for at in range(0, len(ids), 256)]
        records: list[Any] = []
        lost = count = 0.0
        for window in windows:
            record: list[Any] = []
            with torch.no_grad():
                model(torch.tensor([window]), record=record)
                logits = model(torch.tensor([window]), force_expert=expert)[0, :-1]
            lost += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
            count += len(window) - 1
            records.append(record)
        row = report.perplexity[place]
        assert (row["text"], row["domain"], row["tokens"]) == (f"{name}.txt", name, len(ids))
        assert row["perplexity"]["forced"] == pytest.approx(torch.tensor(lost / count).exp().item(), rel=1e-5)
        assert set(row["perplexity"]) == {"seed", "code", "law", "average", "merged", "forced"}
        for site in report.held_out["routers"]:
            gates = [getattr(record[site["layer"]], f"{site['router']}_gates")[0] for record in records]
            first = torch.cat([one[1:].argmax(-1) for one in gates])
            found = site["of"][place]
            assert found["accuracy"] == pytest.approx(float((first == expert).double().mean()), abs=0.01)
            assert found["first"] == pytest.approx((torch.bincount(first, minlength=3) / len(first)).tolist(), abs=0.01)
            right = [int(torch.bincount(one.argmax(-1), minlength=3).argmax()) == expert for one in gates]
            assert found["windows"] == pytest.approx(sum(right) / len(right))
            if site["router"] == "ffn":
                chosen = torch.cat([one > 0 for one in gates])
                assert found["load"] == pytest.approx((chosen.sum(0) / chosen.sum()).tolist(), abs=0.01)
    for overall in report.held_out["overall"]:
        sites = [site for site in report.held_out["routers"] if site["router"] == overall["router"]]
        assert overall["accuracy"] == pytest.approx(sum(site["accuracy"] for site in sites) / len(sites))
    assert [overall["router"] for overall in report.held_out["overall"]] == (["attention", "ffn"] if method == "bam" else ["ffn"])


def test_a_text_alone_is_measured_as_before(tmp_path: Path) -> None:
    folder, plan = merged(tmp_path)
    text = write_words(tmp_path / "held.txt", random_ids(600))
    alone = verify(folder, plan, [text])
    both = verify(folder, plan, [text], domains=domains(tmp_path, law=64))
    assert alone.held_out is None and not alone.readings and "held_out" not in alone.document()
    assert set(alone.perplexity[0]) == {"text", "tokens", "perplexity"} and "forced" not in alone.perplexity[0]["perplexity"]
    assert alone.perplexity[0] == both.perplexity[0]
    assert [row["domain"] for row in both.document()["held_out"]["texts"]] == ["law"]


def test_planted_routers_show(tmp_path: Path, run: Any) -> None:
    """Domains of different words: rows are made that are right in the first layer's attention, and the same with two rows exchanged."""
    folder, _ = merged(tmp_path)
    words = {"seed": range(3, 10), "code": range(10, 17), "law": range(17, 24)}
    texts = {name: str(write_words(tmp_path / f"{name}.txt", [*own] * 40)) for name, own in words.items()}
    model = load_model(folder)
    ids = torch.tensor([token for own in words.values() for token in own])
    x_MD = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).detach().double()
    wanted_MN = torch.nn.functional.one_hot(torch.arange(len(ids)) // 7, 3).double() * 9
    rows_ND = torch.linalg.lstsq(x_MD, wanted_MN).solution.T.float()
    forge = Forger(folder)
    forge.write("model.layers.0.self_attn.router.weight", rows_ND)
    arguments = [part for name, file in texts.items() for part in ("--texts", f"{name}={file}")]

    def first_site() -> Any:
        result = run("verify", folder, "--json", *arguments)
        document = json.loads(result.out)["held_out"]
        return next(site for site in document["routers"] if (site["layer"], site["router"]) == (0, "attention"))

    right = first_site()
    assert right["accuracy"] == right["windows"] == 1.0
    assert [row["first"][index] for index, row in enumerate(right["of"])] == [1.0, 1.0, 1.0]
    forge.write("model.layers.0.self_attn.router.weight", rows_ND[[0, 2, 1]])
    wrong = first_site()
    assert [row["accuracy"] for row in wrong["of"]] == [1.0, 0.0, 0.0]
    assert wrong["of"][1]["first"] == [0.0, 0.0, 1.0]
    for layer in (0, 1):
        for half in ("self_attn", "mlp"):
            twice = forge.read(f"model.layers.{layer}.{half}.router.weight")
            twice[2] = twice[1]
            forge.write(f"model.layers.{layer}.{half}.router.weight", twice)
    shown = run("verify", folder, *arguments)
    assert "experts 1 (code) and 2 (law) have the same row in every router" in " ".join(shown.out.split())
    assert "is an expert there twice?" in shown.out and "accuracy by layer" in shown.out


# ---- words ---------------------------------------------------------------------------------------------------------------------


def routed(shares: dict[str, list[float]], tokens: int = 400, layers: int = 3, names: tuple[str, ...] = NAMES) -> Routed:
    """Texts whose tokens have these shares of first experts, in every router of every layer, spread evenly."""
    texts, choices = [], []
    for domain, of in shares.items():
        texts.append(
            HeldOut(
                f"{domain}.txt", [torch.zeros(1, tokens, dtype=torch.long)], domain, tuple(i for i, n in enumerate(names) if n == domain)
            )
        )
        firsts = [expert for expert, share in enumerate(of) for _ in range(round(share * tokens))]
        experts_MK = torch.tensor(firsts)[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))][:, None]
        choices.append([
            Choices(layer, router, experts_MK, torch.ones(tokens, 1), of, of, 1.0) for layer in range(layers) for router in ("attention", "ffn")
        ])  # fmt: skip
    return Routed(names, texts, choices)


def words_of(
    found: Routed, folder: Path, perplexity: list[dict[str, Any]] | None = None, made_of: dict[str, int] | None = None
) -> dict[str, str]:
    """The answers by question, for routers of an ordinary mixture."""
    if not (folder / "out").exists():
        merged(folder)
    said: dict[str, str] = {}
    for reading in readings(found, found.document(), perplexity or [], open_model(folder / "out"), made_of or {}):
        said[reading.question] = f"{said.get(reading.question, '')} {reading.text}".strip()
    return said


APART, ALIKE, TWICE, USELESS, COSTS, ENOUGH = (
    "do the routers tell the domains apart?", "do domains resemble each other?", "is an expert there twice?", "is an expert useless?",
    "what do routing and averaging cost?", "is there enough text?",
)  # fmt: skip


def test_words_on_accuracy(tmp_path: Path) -> None:
    good = words_of(routed({"seed": [0.9, 0.05, 0.05], "code": [0.05, 0.9, 0.05], "law": [0.1, 0.1, 0.8]}), tmp_path)
    assert set(good) == {APART}, "nothing else is wrong"
    assert good[APART].startswith("yes: to their own expert go attention 87% of the tokens, 100% of the windows and ffn 87%")
    partly = words_of(routed({"seed": [0.6, 0.2, 0.2], "code": [0.35, 0.45, 0.2], "law": [0.3, 0.2, 0.5]}), tmp_path)
    assert partly[APART].startswith("partly: ")
    chance = words_of(routed({"seed": [0.34, 0.33, 0.33], "code": [0.34, 0.33, 0.33], "law": [0.34, 0.33, 0.33]}), tmp_path)
    assert chance[APART].startswith("no: ") and "chance is 33%" in chance[APART] and ALIKE not in chance
    assert "They were drawn at random" in chance[APART]
    alike = words_of(
        routed({"seed": [0.34, 0.33, 0.33], "code": [0.34, 0.33, 0.33]}), tmp_path, made_of={"seed": 900, "code": 900, "law": 900}
    )
    assert "the domains resemble each other, or the texts that the routers are made of are not typical" in alike[APART]


def test_words_on_domains_that_resemble_each_other(tmp_path: Path) -> None:
    said = words_of(routed({"seed": [0.9, 0.05, 0.05], "code": [0.0, 0.55, 0.45], "law": [0.05, 0.5, 0.45]}), tmp_path)[ALIKE]
    assert "code and law do, for the attention routers: 45% of code's tokens go to law's expert, and 50% of law's to code's." in said
    one_way = words_of(routed({"seed": [0.9, 0.05, 0.05], "code": [0.0, 0.9, 0.1], "law": [0.05, 0.5, 0.45]}), tmp_path)
    assert ALIKE not in one_way, "law's text is like code's, not the other way round"


def test_words_on_useless_experts(tmp_path: Path) -> None:
    idle = {"seed": [0.7, 0.3, 0.0], "code": [0.0, 1.0, 0.0], "law": [0.5, 0.45, 0.05]}
    said = words_of(routed(idle), tmp_path)[USELESS]
    assert "law is hardly chosen by the attention routers (1.67% of all choices, 5% on its own text) and ffn routers" in said
    fair = {"seed": [0.8, 0.1, 0.1], "code": [0.1, 0.8, 0.1], "law": [0.1, 0.1, 0.8]}
    own = {"seed": 9.0, "code": 9.0, "law": 12.0, "average": 10.0, "merged": 11.0}
    rows = [{"domain": name, "perplexity": {**own, "forced": forced}} for name, forced in (("code", 9.1), ("law", 12.1))]
    worse = words_of(routed(fair), tmp_path, rows)
    assert worse[USELESS].startswith(
        "law is, for this text: with its expert forced the perplexity is 12.10, that of the average of all models 10.00"
    )
    assert "code" not in worse[USELESS]
    costs = worse[COSTS]
    assert (
        "code: 11.00; with its expert forced 9.10, so routing costs 20.9%; its own model 9.00, so averaging the rest costs 1.1%; the average of all 10.00."
        in costs
    )
    gains = [{"domain": "code", "perplexity": {**own, "merged": 8.5, "forced": 8.8}}]
    assert "so routing gains 3.4%; its own model 9.00, so averaging the rest gains 2.2%" in words_of(routed(fair), tmp_path, gains)[COSTS]
    broken = [{"domain": "code", "perplexity": {**own, "merged": 7e5, "forced": 9.1}}]
    assert (
        "7.00e+05" in words_of(routed(fair), tmp_path, broken)[COSTS]
        and "gates that do not sum to one" in words_of(routed(fair), tmp_path, broken)[COSTS]
    )
    (tmp_path / "whole").mkdir()
    merged(tmp_path / "whole", "ffn: {top_k: 2, gate: topk_then_softmax}")
    spoilt = words_of(routed(fair), tmp_path / "whole", [{"domain": "code", "perplexity": {**own, "merged": 7e5, "forced": 8e5}}])[COSTS]
    assert spoilt.endswith("Worse than the average, as its expert is."), "gates that sum to one are not to blame"


def test_words_on_little_text(tmp_path: Path) -> None:
    found = routed({"seed": [0.8, 0.1, 0.1], "code": [0.1, 0.8, 0.1]}, tokens=50)
    assert words_of(found, tmp_path)[ENOUGH].startswith("no: these figures are of little text of seed (50 tokens), code (50 tokens);")
    enough = routed({"seed": [0.8, 0.1, 0.1], "code": [0.1, 0.8, 0.1]})
    little = words_of(enough, tmp_path, made_of={"seed": 8192, "code": 52, "law": 254})
    assert little[ENOUGH].startswith("no: routers are made of too little text of code (52 tokens), law (254 tokens), so")
    assert ENOUGH not in words_of(enough, tmp_path, made_of={"seed": 8192, "code": 255})
    again = Routed(enough.names, [replace(text, seen=text.domain == "code") for text in enough.texts], enough.choices)
    assert words_of(again, tmp_path)[ENOUGH].startswith("nothing is left of the texts of code that the routers were not made of")
    assert [text["held_out"] for text in again.document()["texts"]] == [True, False]


def test_an_expert_twice_may_take_its_texts_by_either(tmp_path: Path) -> None:
    names = ("seed", "code", "law", "code")
    found = routed({"seed": [0.7, 0.1, 0.1, 0.1], "code": [0.1, 0.4, 0.1, 0.4], "law": [0.1, 0.1, 0.7, 0.1]}, names=names)
    figures = found.document()
    assert figures["chance"] == pytest.approx((1 + 2 + 1) / 3 / 4)
    assert figures["overall"][0]["of"][1]["accuracy"] == pytest.approx(0.8, abs=0.01)
    folder, plan = merged(tmp_path, f"experts: [seed, code, law, code]\n{LOUD}")
    report = verify(folder, plan, domains=domains(tmp_path, code=300))
    assert report.held_out is not None and report.held_out["chance"] == 0.5


# ---- what is refused -----------------------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_used_are_all_named(tmp_path: Path, run: Any) -> None:
    folder, _ = merged(tmp_path)
    law = domains(tmp_path, law=300)["law"]
    result = run("verify", folder, "--texts", f"lwa={law}", "--texts", f"code={tmp_path / 'none.txt'}", "--texts", "law=")
    assert result.status == 2 and "--texts 'law=': write NAME=FILE" in result.err
    result = run("verify", folder, "--texts", f"lwa={law}", "--texts", f"code={tmp_path / 'none.txt'}")
    assert (result.status, result.out) == (2, "")
    assert "--texts lwa: no expert is called so; did you mean 'law'? Experts: seed, code, law." in result.err
    assert "--texts code: " in result.err and "no such file or folder" in result.err
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in run("verify", folder, "--texts", f"law={law}").err


def test_a_dense_result_has_perplexities_and_no_routers(tmp_path: Path) -> None:
    folder, plan = merged(tmp_path, "", "merge")
    report = verify(folder, plan, domains=domains(tmp_path, law=300))
    assert report.ok and report.held_out is None
    assert [set(row["perplexity"]) for row in report.perplexity] == [{"seed", "code", "law", "average", "merged"}]


def test_several_files_of_a_domain_are_one_text(tmp_path: Path) -> None:
    folder, _ = merged(tmp_path)
    (tmp_path / "texts").mkdir()
    for index in (1, 2):
        write_words(tmp_path / "texts" / f"{index}.txt", random_ids(300, index))
    (found,) = read_domains(folder, {"law": str(tmp_path / "texts" / "*.txt")}, NAMES)
    assert (found.name, found.tokens, found.experts) == ("law (2 files)", 600, (2,))
    assert found.lengths == [256, 256, 44, 44]
    assert found.scored.sum() == 600 - 4 and not found.scored[[0, 256, 512, 556]].any()
    with pytest.raises(CheckpointError, match="matches no file"):
        read_domains(folder, {"law": str(tmp_path / "*.md")}, NAMES)


def test_batches_hold_windows_of_one_length_in_order() -> None:
    windows = [(1, 2, 3)] * 5 + [(4, 5)] + [(6, 7, 8)]
    assert [tuple(batch.shape) for batch in batches_of(windows)] == [(4, 3), (1, 3), (1, 2), (1, 3)]
    assert torch.cat([batch.flatten() for batch in batches_of(windows)]).tolist() == [token for window in windows for token in window]
