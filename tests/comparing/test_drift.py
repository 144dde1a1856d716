"""`diff --seed`: every figure against a direct computation, and the right words for models that are made to earn them."""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, Result
from safetensors.torch import load_file, save_file

from bam_merge.comparing.branches import drift
from bam_merge.comparing.drift import Drift
from bam_merge.comparing.sides import Side
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError, OutputError
from bam_merge.showing.page import page_of, write_page

CONFIG = {**CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = ("code", "law", "math")


def branch(folder: Path, name: str, change: Callable[[str, np.ndarray], np.ndarray], dtype: str = "F32") -> Path:
    seed = random_values(91, 0.1)  # with 1 the noise of 1 would be a multiple of it
    write_checkpoint(folder / name, CONFIG, lambda tensor, shape: change(tensor, seed(tensor, shape)), dtype=dtype)
    return folder / name


def noise(scale: float, seed: int) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(tensor: str, values: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng([seed, *tensor.encode()])
        return values + scale * np.sqrt(np.mean(values**2)) * generator.standard_normal(values.shape)

    return change


def same(tensor: str, values: np.ndarray) -> np.ndarray:
    return values


@pytest.fixture
def noisy(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A seed, and three branches that went in random directions by a tenth of its norm."""
    return branch(tmp_path, "seed", same), [branch(tmp_path, name, noise(0.1, index)) for index, name in enumerate(NAMES)]


def said(found: Drift) -> str:
    return " ".join(reading.text for reading in found.readings)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_figures_are_those_of_a_direct_computation(dtype: str, tmp_path: Path) -> None:
    folders = [
        branch(tmp_path, name, noise(scale, index), dtype)
        for index, (name, scale) in enumerate(zip(("seed", *NAMES), (0, 0.1, 0.2, 0.3), strict=True))
    ]
    found = drift(folders[0], folders[1:])
    stored = [load_file(next(folder.glob("*.safetensors"))) for folder in folders]
    seed, *experts = ({name: t.double() for name, t in tensors.items()} for tensors in stored)
    whole = [torch.cat([tensors[name].flatten() for name in seed]) for tensors in (seed, *experts)]
    s, deltas = whole[0], [e - whole[0] for e in whole[1:]]
    gram = found.overall
    for i, d in enumerate(deltas):
        assert gram.drift(i) == pytest.approx(float(d.norm() / s.norm()), rel=1e-5)
        assert gram.seed_cosine(i) == pytest.approx(float(torch.dot(s, s + d) / s.norm() / (s + d).norm()), abs=1e-6)
        assert gram.equal_seed[i] == int((d == 0).sum())
    for i, j in combinations(range(3), 2):
        assert gram.cosine(i, j) == pytest.approx(float(torch.dot(deltas[i], deltas[j]) / deltas[i].norm() / deltas[j].norm()), abs=1e-5)
        assert gram.equal[i][j] == gram.equal[j][i] == int((deltas[i] == deltas[j]).sum())
    norms = torch.stack([d.norm() for d in deltas])
    assert gram.kept_by_averaging() == pytest.approx(float(torch.stack(deltas).mean(0).norm() / norms.mean()), rel=1e-5)
    assert gram.kept_if_orthogonal() == pytest.approx(float(norms.square().sum().sqrt() / norms.sum()), rel=1e-5)
    name = "model.layers.1.mlp.up_proj.weight"
    one = found.part("ffn.up", 1)
    assert one is not None and one.drift(2) == pytest.approx(float((experts[2][name] - seed[name]).norm() / seed[name].norm()), rel=1e-5)


def test_random_directions_are_called_so(noisy: tuple[Path, list[Path]]) -> None:
    found = drift(noisy[0], noisy[1])
    assert found.overall.kept_by_averaging() == pytest.approx(3**-0.5, abs=0.01)
    assert found.overall.kept_if_orthogonal() == pytest.approx(3**-0.5, abs=0.001)
    assert "no more alike than noise" in said(found) or "nearly orthogonal" in said(found)
    assert "attention drifted 1.00 times as far" in said(found) and not any(reading.stop for reading in found.readings)


def test_a_shared_direction_is_kept_by_averaging(tmp_path: Path) -> None:
    seed = branch(tmp_path, "seed", same)
    experts = [branch(tmp_path, name, lambda t, v, i=i: noise(0.01, i)(t, noise(0.2, 9)(t, v))) for i, name in enumerate(NAMES)]
    found = drift(seed, experts)
    assert (found.overall.kept_by_averaging() or 0) > 0.99 and "all but the same" in said(found)


def test_attention_that_stayed_is_said_to_buy_little(tmp_path: Path) -> None:
    seed = branch(tmp_path, "seed", same)
    experts = [branch(tmp_path, name, lambda t, v, i=i: noise(0.001 if "attn" in t else 0.1, i)(t, v)) for i, name in enumerate(NAMES)]
    assert "attention experts (BAM) buy little over BTX" in said(drift(seed, experts))


def test_what_else_tells_the_folders_apart_is_said(noisy: tuple[Path, list[Path]], run: Any) -> None:
    seed, (code, law, _) = noisy
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    (path,) = law.glob("*.safetensors")
    save_file({**load_file(path), "extra": torch.ones(2)}, path)
    texts = [finding.text for finding in drift(seed, [code, law]).findings]
    assert [text.partition(": ")[2] for text in texts] == [
        "1 tensor not in all of the models, extra", "config.json: rms_norm_eps is 1e-05 in the seed, 0.25 in it"
    ]  # fmt: skip
    assert run("diff", "--seed", seed, seed).status == 0 and not drift(seed, [law]).equal
    (path,) = seed.glob("*.safetensors")
    save_file({**load_file(path)}, law / path.name)
    assert drift(seed, [law]).equal
    save_file({**load_file(path), "extra": torch.ones(2)}, law / path.name)
    assert run("diff", "--seed", seed, law).status == 1  # all that can be compared is equal, but it is not the seed


def test_weights_in_common_by_chance(tmp_path: Path) -> None:
    """Of values from a set of four, a quarter: what unrelated models of such weights share; branches share far more."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(0, 4, (64, 4096), generator=generator).float()
    e = s.where(torch.rand(s.shape, generator=generator) < 0.9, -1.0)
    for name, x in (("s", s), ("e", e)):
        save_file({"x": x}, tmp_path / f"{name}.safetensors")
    found = drift(tmp_path / "s.safetensors", [tmp_path / "e.safetensors"]).overall
    assert found.chance_equal == pytest.approx(0.25, abs=0.01) and found.equal_seed[0] == int((s == e).sum())


@pytest.mark.parametrize("experts", [2, 4, 6])
def test_every_pair_of_experts_is_there(experts: int, noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any) -> None:
    """By names where they fit, by numbers, or as least, mean and most with the whole matrix below."""
    folders = [branch(tmp_path, f"expert{index}", noise(0.1, index)) for index in range(experts)]
    done: Result = run("diff", "--seed", noisy[0], *folders)
    shown = {2: "expert0, expert1", 4: "1, 2   1, 3   1, 4   2, 3   2, 4   3, 4", 6: "least    mean    most"}[experts]
    squeezed = " ".join(done.out.split())
    assert " ".join(shown.split()) in squeezed and max(map(len, done.out.split("\n"))) <= 80
    assert ("cosine of task vectors overall" in squeezed) == (experts == 6) and "expert1" in done.out
    document = json.loads(run("diff", "--seed", noisy[0], *folders, "--json").out)
    assert len(document["by_role"]["ffn.up"]["cosine"]) == experts and all(r["question"] and r["answer"] for r in document["readings"])


def test_models_that_are_the_same_are_named(noisy: tuple[Path, list[Path]], run: Any) -> None:
    seed, (code, law, _) = noisy
    found = drift(seed, [seed, law, law])
    assert "no: seed never left it, every weight is equal. The others did: " in said(found)
    assert re.search(r"yes: .+ and .+, every weight is equal", said(found))
    done: Result = run("diff", "--seed", seed, seed)
    assert done.status == 0 and "seed never left it, every weight is equal" in " ".join(done.out.split())
    assert run("diff", "--seed", seed, code).status == 1


def test_another_ancestor_is_a_stop(noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any) -> None:
    write_checkpoint(tmp_path / "stranger", CONFIG, random_values(77, 0.1))
    found = drift(noisy[0], [noisy[1][0], tmp_path / "stranger"])
    assert found.readings[0].stop and "stranger is no branch of this seed" in found.readings[0].text and len(found.readings) == 3
    done: Result = run("diff", "--seed", noisy[0], *noisy[1], tmp_path / "stranger", "--json")
    assert done.status == 1 and json.loads(done.out)["stop"] is True


def test_what_cannot_be_compared(noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any) -> None:
    write_checkpoint(tmp_path / "wide", {**CONFIG, "intermediate_size": 128}, random_values(1, 0.1))
    done: Result = run("diff", "--seed", noisy[0], tmp_path / "wide")
    assert done.status == 2 and "is [128, 64], the seed has [96, 64]" in done.err and "not branches of one model" in done.err
    (path,) = noisy[1][0].glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"code: model.norm.weight holds NaN or infinity"):
        drift(noisy[0], noisy[1])


def test_the_documents_numbers_are_the_tables(noisy: tuple[Path, list[Path]], run: Any) -> None:
    done: Result = run("diff", "--seed", noisy[0], *noisy[1], "--json")
    document = json.loads(done.out, parse_constant=lambda text: pytest.fail(text))
    assert list(document["experts"]) == list(NAMES) and not document["stop"] and len(document["tensors"]) == 21
    assert document["overall"]["relative_drift"]["law"] == pytest.approx(0.1, rel=0.01)
    assert document["by_role"]["attn.q"]["cosine"][0][0] == 1.0
    ranked = [layer["relative_drift"] for layer in document["layers"]]
    assert ranked == sorted(ranked, reverse=True) and len(ranked) == 2


@pytest.mark.parametrize("options", [{}, {"width": 120}, {"colour": True}, {"unicode": False}])
def test_text_fits(options: dict[str, Any], noisy: tuple[Path, list[Path]]) -> None:
    from bam_merge.showing.drift import drift_text
    from bam_merge.showing.terminal import Terminal

    terminal = Terminal(**options)
    text = drift_text(drift(noisy[0], noisy[1]), terminal, every=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.split("\n"))) <= terminal.width and ("\x1b" in text) == terminal.colour
    for word in ("reading", "code  drift from the seed", "attn.q", "task vectors", "equal weights", "layers by drift", "up to"):
        assert word in plain
    assert terminal.unicode or plain.isascii()


# ---- the page ------------------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_and_escapes(noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any) -> None:
    evil = tmp_path / "<script>alert(1)<"
    noisy[1][0].rename(evil)
    page = tmp_path / "drift.html"
    done: Result = run("diff", "--seed", noisy[0], evil, noisy[1][1], "--html", page)
    text = page.read_text()
    assert done.status == 1 and len(text) < 500_000
    assert re.findall(r"""(?:https?:)?//[a-z]|src=|url\(|@import|<link""", text) == [] and "default-src 'none'" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;" in text
    for word in ("data-map=", "model.layers.1.mlp.up_proj.weight", "what averaging keeps", "prefers-color-scheme: dark"):
        assert word in text


def test_a_comparison_has_a_page_too(noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any) -> None:
    page = tmp_path / "diff.html"
    assert run("diff", noisy[0], noisy[1][0], "--html", page).status == 1
    assert "tensors that differ" in page.read_text()


def test_a_large_models_page_stays_small(noisy: tuple[Path, list[Path]]) -> None:
    found = drift(noisy[0], noisy[1])
    roles = [(role, gram) for (role, layer, _), gram in found.grams.items() if layer == 0]
    grams = {(role, layer, None): gram for layer in range(126) for role, gram in roles}
    leaves = {place: found.seed.leaves[place[0], 0, None] for place in grams}
    seed = Side("seed", found.seed.anatomy, None, leaves, {})
    assert 100_000 < len(page_of(replace(found, seed=seed, grams=grams))) < 500_000


def test_a_page_is_written_whole_or_not_at_all(
    noisy: tuple[Path, list[Path]], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    done: Result = run("diff", noisy[0], noisy[0], "--html", page)
    assert done.status == 2 and "exists. Choose another name, or replace it with --force." in done.err and page.read_text() == "mine"
    assert run("diff", noisy[0], noisy[0], "--html", tmp_path / "no" / "page.html").status == 2
    found = drift(noisy[0], noisy[1])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device"):
        write_page(found, page, force=True)
    assert page.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["code", "law", "math", "page.html", "seed"]
    monkeypatch.undo()
    write_page(found, page, force=True)
    assert page.read_text().startswith("<!doctype html>")


def test_tensors_longer_than_a_block(tmp_path: Path) -> None:
    """The last block of a tensor is shorter than the others."""
    from bam_merge.comparing.tensor_difference import BLOCK

    generator = torch.Generator().manual_seed(0)
    s, d = (torch.randn(BLOCK + 4097, generator=generator) for _ in range(2))
    for name, x in (("s", s), ("a", s + 0.1 * d), ("b", s - 0.1 * d)):
        save_file({"x": x}, tmp_path / f"{name}.safetensors")
    found = drift(tmp_path / "s.safetensors", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]).overall
    assert (
        found.count == len(s)
        and found.cosine(0, 1) == pytest.approx(-1, abs=1e-5)
        and found.kept_by_averaging() == pytest.approx(0, abs=1e-3)
    )
    assert found.drift(0) == pytest.approx(float(0.1 * d.norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize("layers", [2, 31, 126])
def test_a_heatmap_is_as_high_as_its_rows(layers: int) -> None:
    """The picture, and the words to its left and right, end with the last row: below it nothing is cut."""
    from bam_merge.showing.heatmap import HeatmapRow
    from bam_merge.showing.page import AXIS, heatmap_picture

    rows = [HeatmapRow(f"role {index}", [0.1] * layers, 0.1) for index in range(9)] + [
        HeatmapRow("embed", [0.2], 0.2),
        HeatmapRow("head", [None], None),
    ]
    drawn = heatmap_picture("x", rows, 0.2)
    (width, height) = map(int, re.findall(r'<svg width="(\d+)" height="(\d+)"', drawn)[0])
    cells = [(int(x) + int(w), int(y) + int(h)) for x, y, w, h in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)", drawn)]
    assert height == 11 * 16 + AXIS and max(y for _, y in cells) == height - 16 - 1 and max(x for x, _ in cells) == width - 1
    for side in re.findall(r'<div class="(?:labels|totals)">(.*?)</div></div>', drawn):
        assert side.count("<div") == 12  # each 16 high, the axis among them


PROBE = """<script>
const cut = [];
for (const box of document.querySelectorAll(".scroll, .map")) {
  const end = box.getBoundingClientRect().top + box.clientHeight + 0.6;
  for (const row of box.querySelectorAll("tr, svg, .labels > div"))
    if (row.getBoundingClientRect().top < end - 1.2 && row.getBoundingClientRect().bottom > end) cut.push(row.textContent);
}
document.body.innerHTML = `<pre>measured, ${document.querySelectorAll("tr").length > 40} ${cut.length} cut</pre>`;
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="measured in a browser, where there is one")
@pytest.mark.parametrize("width", [1100, 420])
def test_no_row_of_the_page_is_cut(width: int, noisy: tuple[Path, list[Path]], tmp_path: Path) -> None:
    found = drift(noisy[0], noisy[1])
    roles = [(role, gram) for (role, layer, _), gram in found.grams.items() if layer == 0]
    grams = {(role, layer, None): gram for layer in range(60) for role, gram in roles}
    seed = Side("seed", found.seed.anatomy, None, {place: found.seed.leaves[place[0], 0, None] for place in grams}, {})
    page = page_of(replace(found, seed=seed, grams=grams)).replace("</body>", PROBE)
    (tmp_path / "page.html").write_text(page)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-features=OverlayScrollbar", f"--window-size={width},900"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run(["chromium", *options, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True)
    assert "measured, true 0 cut" in done.stdout


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_page_has_the_mode_that_the_umask_leaves(noisy: tuple[Path, list[Path]], tmp_path: Path, mask: int) -> None:
    found, before = drift(noisy[0], noisy[1]), os.umask(mask)
    try:
        write_page(found, tmp_path / "page.html")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o666 & ~mask
