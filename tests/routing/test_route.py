"""Which expert takes which token: planted routing shows, every layout against whole models and transformers; terminal, page and JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, Forger
from word_texts import random_ids, words_tokenizer, write_words

from bam_merge import load_model
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import BamMergeError, CheckpointError, VerifyError
from bam_merge.model.model import Norm
from bam_merge.model.tokens import open_tokenizer, pieces_of
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.routing.route import RouteOptions, route
from bam_merge.showing.routes import coloured, routes_text
from bam_merge.showing.routes_page import places, routes_page
from bam_merge.showing.terminal import Terminal

LOUD = "router: {init: normal, std: 0.5}"


def mixture(folder: Path, text: str = LOUD, method: str = "bam", family: str = "llama", output: str = "{path: out}") -> Path:
    """A merge of three sources, with a tokenizer of words."""
    write_sources(folder, CONFIGS[family])
    words_tokenizer(folder / "seed")
    return publish(plan_file(write_recipe(folder, text, method, output=output)), None, UNPROVED)


def test_planted_routing_shows(tmp_path: Path, run: Any) -> None:
    """The attention router of the first layer sees a token's own embedding: rows are made that send each of twelve tokens where we say."""
    folder = mixture(tmp_path)
    model = load_model(folder)
    sent = {token: token * 7 % 3 for token in range(3, 15)}
    x_MD = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(list(sent)))).detach().double()
    wanted_MN = torch.nn.functional.one_hot(torch.tensor(list(sent.values())), 3).double() * 9
    forge = Forger(folder)
    forge.write("model.layers.0.self_attn.router.weight", torch.linalg.lstsq(x_MD, wanted_MN).solution.T.float())
    ids = [token for _ in range(40) for token in sent]  # longer than a window
    text = write_words(tmp_path / "text", ids)
    found = route(folder, [text])
    (one,) = found.texts
    planted = one.of("attention")[0]
    assert planted.experts_MK[:, 0].tolist() == [sent[token] for token in ids]
    assert planted.gates_MK[:, 0].min() > 0.99
    share = [sum(sent[token] == expert for token in ids) / len(ids) for expert in range(3)]
    assert planted.share == pytest.approx(share)
    assert one.text.pieces[:2] == ("w3", " w4")
    assert one.of("attention")[1].experts_MK[:, 0].tolist() != planted.experts_MK[:, 0].tolist()
    shown = run("route", folder, "--text", text, "--layers", "0", "--tokens", "6")
    assert shown.status == 0
    assert "⟨0⟩w3 ⟨1⟩w4 ⟨2⟩w5 ⟨0⟩w6 ⟨1⟩w7 ⟨2⟩w8" in shown.out
    own = run("route", folder, "--texts", f"code={write_words(tmp_path / 'code.txt', [4, 7, 10, 13] * 8)}", "--json")
    (text_of_code,) = json.loads(own.out)["texts"]
    assert [row["accuracy"] for row in text_of_code["routing"] if (row["layer"], row["router"]) == (0, "attention")] == [1.0]


LAYOUTS = {
    "bam": ("bam", "llama", "{path: out}", "soft attention, top-1"),
    "bam shared": ("bam", "cohere", "{path: out}", "attention: {kv: shared}"),
    "bam parallel": ("bam", "gpt_neox", "{path: out}", "ffn: {top_k: 3, gate: topk_then_softmax}"),
    "bam top-k": ("bam", "qwen3", "{path: out}", "attention: {routing: top_k, top_k: 2}"),
    "btx": ("btx", "granite", "{path: out}", ""),
    "mixtral": ("btx", "llama", "{path: out, layout: mixtral}", ""),
    "qwen2_moe": ("btx", "qwen2", "{path: out, layout: qwen2_moe}", ""),
    "qwen3_moe": ("btx", "qwen3", "{path: out, layout: qwen3_moe}", ""),
    "granitemoe": ("btx", "granite", "{path: out, layout: granitemoe}", ""),
    "ernie4_5_moe": ("btx", "llama", "{path: out, layout: ernie4_5_moe}", ""),
    "dots1": ("btx", "qwen3", "{path: out, layout: dots1}", "ffn: {gate: topk_then_sigmoid}"),
    "cohere2_moe": ("btx", "cohere2", "{path: out, layout: cohere2_moe}", "ffn: {gate: topk_then_sigmoid}"),
    "flex_olmo": ("btx", "olmo2", "{path: out, layout: flex_olmo}", ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_as_the_whole_model_routes(name: str, tmp_path: Path) -> None:
    method, family, output, more = LAYOUTS[name]
    folder = mixture(tmp_path, f"{LOUD}\n{more if ':' in more else ''}", method, family, output)
    ids = random_ids(300)
    found = route(folder, [write_words(tmp_path / "text", ids)])
    assert found.names == ("seed", "code", "law"), "a native layout's are the manifest's"
    assert found.routers == (["attention", "ffn"] if method == "bam" else ["ffn"])
    record: list[Any] = []
    rest: list[Any] = []
    model = load_model(folder)
    with torch.no_grad():
        model(torch.tensor(ids[:256])[None], record=record)
        model(torch.tensor(ids[256:])[None], record=rest)
    assert len(found.texts[0].choices) == len(found.routers) * 2
    for choices in found.texts[0].choices:
        gates_MN = torch.cat([getattr(part[choices.layer], f"{choices.router}_gates")[0] for part in (record, rest)])
        assert torch.allclose(choices.gates_MK, gates_MN.topk(2).values, atol=1e-5)
        surest = gates_MN.topk(2).values.diff(dim=-1).abs()[:, 0] > 1e-4
        assert surest.sum() > 200
        assert torch.equal(choices.experts_MK[surest, 0], gates_MN.argmax(-1)[surest])
        assert choices.gate == pytest.approx(gates_MN.mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_as_transformers_routes(layout: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = mixture(
        tmp_path, LOUD, "btx", {"mixtral": "llama"}.get(layout, layout.removesuffix("_moe")), f"{{path: out, layout: {layout}}}"
    )
    (folder / "bam_merge.json").unlink()
    ids = random_ids(40)
    found = route(folder, [write_words(tmp_path / "text", ids)])
    assert found.names == ("0", "1", "2")
    (own,) = route(folder, domains={"2": [tmp_path / "text"]}).texts
    assert own.experts == (2,) and own.accuracy(own.choices[0]) is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
    for choices, logits_MN in zip(found.texts[0].choices, logits, strict=True):
        assert torch.equal(choices.experts_MK[:, 0], logits_MN.argmax(-1))
        p_MN = logits_MN.softmax(-1)
        assert choices.entropy == pytest.approx(float(-(p_MN * p_MN.log()).sum(-1).mean()), abs=1e-4)


def test_layers_before_the_last_one_asked_for_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, heard = mixture(tmp_path), []
    text = write_words(tmp_path / "text", random_ids(30))
    whole = route(folder, [text]).texts[0]
    found = route(folder, [text], options=RouteOptions(layers="0", progress=lambda done, total: heard.append((done, total))))
    assert heard == [(0, 1), (1, 1)]
    assert found.layers == (0,)
    assert [(one.layer, one.router) for one in found.texts[0].choices] == [(0, "attention"), (0, "ffn")]
    assert torch.equal(found.texts[0].choices[0].gates_MK, whole.choices[0].gates_MK)
    lines = routes_text(found, Terminal(), True)
    assert "layer 0" in lines and "layer 1" not in lines


def test_most_of_the_layers(tmp_path: Path) -> None:
    """Each token's vote counted by hand; of two experts with as many votes the first."""
    found = route(mixture(tmp_path), [write_words(tmp_path / "text", random_ids(50))])
    (one,) = found.texts
    a, b = (choices.experts_MK[:, 0].tolist() for choices in one.of("ffn"))
    assert one.voted("ffn") == [x if x == y else min(x, y) for x, y in zip(a, b, strict=True)]


def test_a_text_is_shown_whole_and_steers_no_terminal(tmp_path: Path) -> None:
    text = "a\tb \x1b[31mred\x07 \u202e\r\nnext"
    plain = Terminal(80).text(coloured([text], [1], {1: "red"}, Terminal(80)))
    assert "\x1b" not in plain and "\x07" not in plain and "\u202e" not in plain
    assert plain.splitlines()[0].startswith("  ⟨1⟩a") and "\\x1b[31mred\\x07 \\u202e" in plain and plain.splitlines()[-1] == "  next"
    ascii_only = Terminal(80, unicode=False).text(coloured(["a", " b"], [1, 12], {}, Terminal(80, unicode=False)))
    assert ascii_only == "  <1>a <12>b"
    blanks = Terminal(80).text(coloured(["a", "\n  ", "b", " c"], [1, 2, 1, 1], {}, Terminal(80)))
    assert blanks == "  ⟨1⟩a\n    b c", "who takes a blank is not shown"
    colours = Terminal(80, colour=True).text(coloured(["a", " b"], [0, 1], {0: "blue", 1: "red"}, Terminal(80, colour=True)))
    assert "⟨" not in colours and "\x1b[34ma" in colours and "\x1b[31mb" in colours


def test_pieces_put_together_are_the_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(["def f(x): return x"], trainer)
    byte_level.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    byte_level.enable_truncation(3)
    byte_level.save(str(tmp_path / "tokenizer.json"))
    text = "def é🎉日本 f(x):\n\treturn"
    ids, pieces = pieces_of(open_tokenizer(tmp_path), text)
    assert len(ids) == len(pieces) > 20, "what a training program has left in the file cuts no text"
    assert ids[0] == 0 and pieces[0] == ""
    assert "".join(pieces) == text
    assert pieces[pieces.index("🎉") + 1 : pieces.index("🎉") + 4] == ["", "", ""]


def test_no_more_of_a_text_is_read_than_is_looked_at(tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    ids = random_ids(5000)
    long = route(folder, [write_words(tmp_path / "long", ids)], options=RouteOptions(tokens=300, layers=0)).texts[0]
    assert list(long.text.ids) == ids[:300]
    assert [tuple(batch.shape) for batch in long.text.windows] == [(1, 256), (1, 44)]
    wide = tmp_path / "wide"
    wide.write_text(" ".join(f"{' ' * 90}w{i}" for i in ids[:400]))  # a token of more characters than is thought at first
    assert list(route(folder, [wide], options=RouteOptions(tokens=350, layers=0)).texts[0].text.ids) == ids[:350]


def test_the_page_needs_no_network_and_shows_every_layer(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path)
    text = tmp_path / "<b>text"
    text.write_text("w1 </script><script>alert(1)</script> w2 " + "w3 " * 20)
    page = tmp_path / "page.html"
    assert run("route", folder, "--text", text, "--html", page).status == 0
    html = page.read_text()
    assert "<script>alert" not in html and "<b>text" not in html
    assert not re.search(r"(?:src|href)\s*=|url\(|https?://", html)
    found = route(folder, [text])
    data = json.loads(re.search(r'<div class="text"><script type="application/json">(.*?)</script>', html)[1])  # type: ignore[index]
    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
    for router in ("attention", "ffn"):
        assert data["votes"][router] == found.texts[0].voted(router)
        for layer, choices in zip(data["routers"][router]["of"], found.texts[0].of(router), strict=True):
            assert [alphabet.index(layer[at]) for at in range(0, len(layer), 4)] == choices.experts_MK[:, 0].tolist()
            gates = [alphabet.index(layer[at]) / 63 for at in range(1, len(layer), 4)]
            assert gates == pytest.approx(choices.gates_MK[:, 0].tolist(), abs=0.01)
    again = run("route", folder, "--text", text, "--html", page)
    assert again.status == 2 and "exists" in again.err and page.read_text() == html
    assert run("route", folder, "--text", text, "--html", page, "--force").status == 0


def test_more_experts_than_colours(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "seed", CONFIGS["llama"], random_values(3, 0.2))
    words_tokenizer(tmp_path / "seed")
    text = f"experts: [{', '.join(['seed'] * 70)}]\n{LOUD}"
    folder = publish(plan_file(write_recipe(tmp_path, text, "sparse_upcycling", ("seed",))), None, UNPROVED)
    found = route(folder, [write_words(tmp_path / "text", random_ids(200))])
    colours = places(found)
    assert sorted(colours.values()) == list(range(12))
    share = [sum(choices.first_shares[expert] for choices in found.texts[0].choices) for expert in range(70)]
    assert min(share[expert] for expert in colours) >= max(value for expert, value in enumerate(share) if expert not in colours)
    shown = routes_text(found, Terminal(100), False)
    assert "and 58 without a colour" in " ".join(shown.split())
    for expert in found.texts[0].voted("ffn"):
        assert f"⟨{expert}⟩" in shown, "without colours every expert has its number"
    data = json.loads(re.search(r'<div class="text"><script type="application/json">(.*?)</script>', routes_page(found))[1])  # type: ignore[index]
    first, kept = found.texts[0].of("ffn")[0], data["routers"]["ffn"]
    assert data["digits"] == 2
    assert len(kept["of"][0]) == 200 * 2 * 3
    assert sum(
        64 ** (1 - i) * "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_".index(kept["of"][0][i]) for i in (0, 1)
    ) == int(first.experts_MK[0, 0])


def test_what_cannot_be_routed_is_said(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path)
    text = write_words(tmp_path / "text", random_ids(30))
    (tmp_path / "latin").write_bytes("w1 é".encode("latin-1"))
    for said, arguments in {
        "a dense model (model_type llama), which has no routers": (tmp_path / "seed", "--text", text),
        "no text: give one with --text FILE": (folder,),
        "unexpected": (folder, text),
        "--texts lwa: no expert is called so; did you mean 'law'? Experts: seed, code, law.": (folder, "--texts", f"lwa={text}"),
        "write NAME=FILE": (folder, "--texts", text),
        "layer 2 does not exist; the model's layers are 0 to 1": (folder, "--text", text, "--layers", "0-2"),
        "'x' is no layer range": (folder, "--text", text, "--layers", "x"),
        "none: No such file or directory": (folder, "--text", tmp_path / "none"),
        "not a regular file": (folder, "--text", tmp_path),
        "device 'abacus' cannot be used": (folder, "--text", text, "--device", "abacus"),
        "latin: not UTF-8 text (byte 3)": (folder, "--text", tmp_path / "latin"),
        "no such folder": (tmp_path / "nothing", "--text", text),
    }.items():  # fmt: skip
        result = run("route", *arguments)
        assert (result.status, result.out) == (2, ""), said
        assert said in result.err
    (tmp_path / "empty").write_text("")
    with pytest.raises(CheckpointError) as error:
        route(folder, [tmp_path / "empty", tmp_path / "none"])
    assert len(error.value.problems) == 2, "all of them together"
    words_tokenizer(folder, 99)
    with pytest.raises(BamMergeError, match=r"gives the id 98, the model has 64 embeddings: they do not belong together"):
        route(folder, [write_words(tmp_path / "high", [1, 98, 3])])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, so a text cannot be read"):
        route(folder, [text])
    with pytest.raises(VerifyError):
        route(folder, [text], options=RouteOptions(device="abacus"))


def test_a_model_that_computes_no_numbers_is_said_to(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path)
    forge = Forger(folder)
    name = "model.layers.1.mlp.router.weight"
    forge.write(name, forge.read(name) * float("inf"))
    text = write_words(tmp_path / "text", random_ids(30))
    result = run("route", folder, "--text", text, "--html", tmp_path / "page.html")
    assert result.status == 2 and "the ffn router of layer 1 gives NaN or infinity" in result.err
    assert not (tmp_path / "page.html").exists()
    assert run("route", folder, "--text", text, "--layers", "0").status == 0
    forge.write(name, torch.zeros(3, 32))
    forge.write("model.norm.weight", torch.full((32,), 3e38))
    checked = run("verify", folder, "--texts", f"law={text}", "--json")
    assert checked.status == 1, "and no traceback, for there is no NaN in JSON"
    assert json.loads(checked.out)["perplexity"][0]["perplexity"]["merged"] in ("nan", "inf")


def test_a_mixture_that_is_only_to_look_at_is_refused_in_words(tmp_path: Path, run: Any) -> None:
    write_checkpoint(tmp_path / "seed", CONFIGS["llama"], random_values(3, 0.2))
    config = json.loads((tmp_path / "seed" / "config.json").read_text())
    (tmp_path / "seed" / "config.json").write_text(json.dumps({**config, "model_type": "olmoe", "num_experts": 4}))
    result = run("route", tmp_path / "seed", "--text", write_words(tmp_path / "text", [1, 2, 3]))
    assert result.status == 2 and "model_type 'olmoe'" in result.err


def test_the_norm_before_the_planted_router_is_the_models(tmp_path: Path) -> None:
    """What the planted rows are worked out from is x / rms(x), by its formula."""
    model = load_model(mixture(tmp_path))
    norm = model.model.layers[0].input_layernorm
    assert isinstance(norm, Norm)
    x_MD = model.model.embed_tokens.weight[:5].detach()
    by_hand = x_MD / (x_MD.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    assert torch.allclose(norm(x_MD), by_hand, atol=1e-6)
