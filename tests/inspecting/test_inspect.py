"""bam-merge inspect: the JSON, the picture, provenance, planted oddities, bad input, and that headers need neither torch nor numpy."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import CONFIGS
from safetensors.numpy import load_file, save_file
from test_plan import PAPER
from test_roles import PUBLIC, edit, mixture, save_public

import bam_merge
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.inspecting.inspection import inspect
from bam_merge.showing.inspection import inspection_text
from bam_merge.showing.terminal import Terminal

ESCAPE = "\x1b"


def dense(folder: Path, name: str = "llama", **options: Any) -> Path:
    return write_checkpoint(folder, CONFIGS[name], random_values(1), **options)


# ---- JSON


KEYS = {
    "path",
    "model_type",
    "parameters",
    "bytes",
    "dtypes",
    "layers",
    "experts",
    "kv_cache_bytes_per_token",
    "flops_per_token",
    "tensors",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_of_every_family(name: str, tmp_path: Path, run: Any) -> None:
    result = run("inspect", dense(tmp_path, name, dtype="BF16", shards=2), "--json")
    assert (result.status, result.err) == (0, "")
    document = json.loads(result.out)
    assert document.keys() >= KEYS
    stored = bam_merge.inspect(tmp_path).checkpoint.tensors
    total = sum(entry.numel for entry in stored.values())
    assert document["parameters"]["total"] == document["parameters"]["active"] == sum(document["parameters"]["by_role"].values()) == total
    assert sum(document["parameters"]["by_layer"].values()) == sum(document["parameters"]["active_by_layer"].values()) == total
    assert (document["bytes"], document["dtypes"], document["layers"]) == (2 * total, {"BF16": total}, 2)
    assert document["experts"] == {"ffn": 0, "attention": 0, "names": None}
    assert {record["name"]: tuple(record["shape"]) for record in document["tensors"]} == {n: e.shape for n, e in stored.items()}
    assert all(record["role"] for record in document["tensors"])
    assert (document["findings"], document["missing"], document["unknown"]) == ([], [], [])


@pytest.mark.parametrize("layout", ["bam", "mixtral", "qwen2_moe"])
def test_json_of_a_mixture(layout: str, tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "llama", "", "bam" if layout == "bam" else "btx", layout)
    document = json.loads(run("inspect", folder, "--json").out)
    manifest = json.loads((folder / "bam_merge.json").read_text())
    assert document["parameters"]["total"] == manifest["parameters"]["total"]
    if layout != "qwen2_moe":  # whose shared expert of zeros the plan counts as active too
        assert document["parameters"]["active"] == manifest["parameters"]["active"]
    attention = 3 if layout == "bam" else 0
    assert document["experts"] == {"ffn": 3, "attention": attention, "names": ["seed", "code", "law"] if layout == "bam" else None}
    record = next(r for r in document["tensors"] if r["role"] == "ffn.up" and (r["layer"], r["expert"]) == (1, 2))
    assert record["expression"] == "law:model.layers.1.mlp.up_proj.weight"
    assert record["reads"] == [{"source": "law", "tensor": "model.layers.1.mlp.up_proj.weight"}]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_mixtures(name: str, tmp_path: Path, run: Any) -> None:
    folder = save_public(name, tmp_path)
    document = json.loads(run("inspect", folder, "--json").out)
    assert document["model_type"] == name
    assert document["parameters"]["total"] == sum(value.size for value in load_file(folder / "model.safetensors").values())
    assert document["parameters"]["active"] < document["parameters"]["total"]
    assert document["flops_per_token"]["total"] > 0
    assert document["findings"] == []
    result = run("inspect", folder)
    assert result.status == 0
    assert f"{name.partition('_v')[0] if name.startswith('deepseek') else name} mixture" in result.out


def test_the_papers_card(tmp_path: Path, run: Any) -> None:
    write_checkpoint(tmp_path, PAPER, lambda name, shape: None, "BF16")
    document = json.loads(run("inspect", tmp_path, "--as-bam", 4, "--json").out)["as_bam"]
    totals = {name: document[name]["parameters"]["total"] for name in ("dense", "btx", "expert_kv", "shared_kv")}
    assert totals == {"dense": 587_209_728, "btx": 700_480_512, "expert_kv": 776_002_560, "shared_kv": 738_253_824}
    layers = {name: document[name]["flops_per_token"]["per_layer"] for name in totals}
    assert (layers["expert_kv"]["attention"], layers["expert_kv"]["total"], layers["btx"]["total"]) == (35_651_584, 48_250_880, 21_504_000)
    text = run("inspect", tmp_path, "--as-bam", 4).out
    for shown in ("776,002,560", "738,253,824", "48,250,880", "21,504,000"):
        assert shown in text
    assert widths(text.partition("\n")[2]) <= 80
    assert re.search(r"times dense +1 x +4 x +1 x +1 x", text)
    six = json.loads(run("inspect", tmp_path, "--as-bam", 6, "--top-k", 3, "--json").out)["as_bam"]
    assert six["btx"]["flops_per_token"]["per_layer"]["total"] == 46_673_920
    longer = json.loads(run("inspect", tmp_path, "--context", 512, "--json").out)["flops_per_token"]
    assert (longer["context"], longer["per_layer"]["scores"]) == (512, 2 * 512 * 1024)


def test_the_python_function_is_the_json(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "llama")
    assert json.loads(run("inspect", folder, "--json", "--layer", 1).out) == bam_merge.inspect(str(folder), layer=1).document()
    with pytest.raises(BamMergeError, match="must be at least 1"):
        bam_merge.inspect(folder, context=0)


def test_choosing_tensors(tmp_path: Path) -> None:
    folder = mixture(tmp_path, "llama")
    names = [record["name"] for record in inspect(folder, tensors="*.up_proj.*", layer=1).document()["tensors"]]
    assert names == [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]


# ---- the picture


def widths(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("options", [(), ("--stats",), ("--all",), ("--layer", 0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "deepseek_v3", "bam"])
def test_the_picture_fits_and_is_plain_when_piped(
    name: str, options: tuple[Any, ...], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in CONFIGS:
        folder = dense(tmp_path, name)
    else:
        folder = mixture(tmp_path, "llama") if name == "bam" else save_public(name, tmp_path)
    monkeypatch.chdir(folder)  # the path of the temporary folder is longer than a line
    result = run("inspect", ".", *options)
    assert result.status == 0, result.err
    assert widths(result.out) <= 80
    assert ESCAPE not in result.out
    assert not any(line != line.rstrip() for line in result.out.splitlines())


def test_colour_and_ascii(tmp_path: Path) -> None:
    found = inspect(dense(tmp_path), stats=True)
    assert ESCAPE in inspection_text(found, Terminal(colour=True))
    plain = inspection_text(found, Terminal(width=100, unicode=False))
    assert plain.isascii()
    assert "#" in plain
    assert inspection_text(found, Terminal(width=100)) != plain
    bare = re.sub(r"\x1b\[[0-9;]*m", "", inspection_text(found, Terminal(width=100, colour=True)))
    assert [row.rstrip() for row in bare.splitlines()] == inspection_text(found, Terminal(width=100)).splitlines()


def test_no_colour_is_obeyed_and_ascii_terminals_are_noticed(tmp_path: Path) -> None:
    """On a real terminal: colour without NO_COLOR, none with it; and no byte that an ASCII terminal lacks."""
    pty = pytest.importorskip("pty")
    dense(tmp_path)

    def seen(**environment: str) -> bytes:
        parent, child = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(bam_merge.__file__).parents[1]), **environment}
        env.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen([sys.executable, "-m", "bam_merge", "inspect", str(tmp_path)], stdout=child, stderr=errors, env=env)
            os.close(child)
            shown = b""
            while True:
                try:
                    piece = os.read(parent, 65536)
                except OSError:
                    break
                if not piece:
                    break
                shown += piece
            os.close(parent)
            assert process.wait() == 0
        return shown

    coloured, plain = seen(PYTHONIOENCODING="utf-8"), seen(NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert b"\x1b[" in coloured
    assert "█".encode() in coloured
    assert b"\x1b" not in plain
    assert plain.isascii()


def test_equal_layers_and_experts_are_folded(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "llama")
    text = run("inspect", folder).out
    assert re.search(r"^  2 x model\.layers\.\{0-1\}\. +[\d,]+$", text, re.MULTILINE)
    assert re.search(r"^    mlp\.experts\.\{0-2\}\.up_proj\.weight +F32 \[40, 32\] +1,280$", text, re.MULTILINE)
    everything = run("inspect", folder, "--all").out
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in everything
    assert "{0-1}" not in everything


def test_layers_that_differ_stand_apart(tmp_path: Path, run: Any) -> None:
    text = run("inspect", save_public("qwen2_moe", tmp_path)).out
    assert "layer 0 without experts" in " ".join(text.split())
    assert re.search(r"^  model\.layers\.0\.", text, re.MULTILINE)
    assert re.search(r"^  model\.layers\.1\.", text, re.MULTILINE)
    assert "and one shared by all tokens" in " ".join(text.split())


def test_what_it_says_of_a_mixture(tmp_path: Path, run: Any) -> None:
    text = " ".join(run("inspect", mixture(tmp_path, "llama", "attention: {kv: shared, routing: top_k, top_k: 2}")).out.split())
    for said in ("bam mixture of llama models", "seed, code, law", "FFN: 3, top 1, gates of the softmax over all",
                 "attention: 3, top 2, keys and values shared", "2, sequential; width 32, FFN 40 (gated silu)", "4 heads of 8, 2 for keys"):  # fmt: skip
        assert said in text
    parallel = " ".join(run("inspect", dense(tmp_path / "cohere", "cohere")).out.split())
    assert "parallel, 1 norm" in parallel
    assert "tied to the embeddings" in parallel


# ---- provenance


def test_where_a_tensor_comes_from_and_what_became_of_one(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "llama")
    text = run("inspect", folder, "--tensors", "model.layers.1.mlp.experts.1.up_proj.weight").out
    assert "ffn.up, layer 1, expert 1 (code)" in text
    assert "= code:model.layers.1.mlp.up_proj.weight" in text
    text = run("inspect", folder, "--tensors", "model.norm.weight").out
    assert "= mean(seed, code, law)" in text
    assert "law:model.norm.weight" in text
    text = run("inspect", folder, "--where", "law:model.layers.1.*").out
    assert "law:model.layers.1.mlp.up_proj.weight\n  is model.layers.1.mlp.experts.2.up_proj.weight" in text
    assert "  in model.layers.1.input_layernorm.weight\n     = mean(seed, code, law)" in text
    document = json.loads(run("inspect", folder, "--where", "law:model.norm.*", "--json").out)
    assert document["where"][0]["made"] == [{"name": "model.norm.weight", "expression": "mean(seed, code, law)"}]
    assert "no tensor matches" in run("inspect", folder, "--tensors", "nothing").out


def test_questions_without_an_answer(tmp_path: Path, run: Any) -> None:
    result = run("inspect", dense(tmp_path / "a"), "--where", "law:*")
    assert result.status == 2
    assert "has no bam_merge.json" in result.err
    folder = mixture(tmp_path, "llama")
    assert "did you mean 'law'" in run("inspect", folder, "--where", "lax:*").err
    assert "a mixture already" in run("inspect", folder, "--as-bam", 4).err
    (folder / "bam_merge.json").write_text("{")
    assert run("inspect", folder, "--where", "law:*").status == 2
    result = run("inspect", folder)
    assert result.status == 0
    assert "The manifest is damaged" in " ".join(result.out.partition("findings")[2].split())


# ---- values


def plant(folder: Path, **tensors: Any) -> Path:
    """Change tensors of a model: each value is a function of what was there."""
    path = folder / "model.safetensors"
    values = load_file(path)
    for key, change in tensors.items():
        name = next(name for name in values if key in name.replace(".", "_"))
        values[name] = change(values[name].copy())
    save_file(values, path)
    return folder


def put(index: Any, value: float) -> Any:
    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(("key", "change", "said"), [
    ("layers_1_mlp_up", put((3, 4), numpy.nan), r"NaN: 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight$"),
    ("layers_0_mlp_up", put((slice(0, 2), 4), numpy.inf), r"infinite: 1 tensor: model\.layers\.0\.mlp\.up_proj\.weight \(2\)"),
    ("layers_1_self_attn_o", put((1, 1), -0.0), r"-0\.0: 1 tensor: model\.layers\.1\.self_attn\.o_proj"),
    ("layers_1_self_attn_o", put((1, 1), 3e38), r"within a factor of 2 of the dtype's limit: 1 tensor"),
    ("layers_0_mlp_down", put(slice(2, 5), 0.0), r"with zero rows: 1 tensor: model\.layers\.0\.mlp\.down_proj\.weight \(3\)"),
    ("layers_0_mlp_down", lambda array: array * 0 + 2, r"constant: 1 tensor: model\.layers\.0\.mlp\.down_proj"),
    ("layers_0_mlp_down", lambda array: abs(array * 0), r"all zero: 1 tensor: model\.layers\.0\.mlp\.down_proj"),
])  # fmt: skip
def test_planted_oddities_are_named(key: str, change: Any, said: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    clean = run("inspect", dense(tmp_path), "--stats")
    assert "nothing odd" in clean.out
    result = run("inspect", plant(tmp_path, **{key: change}), "--stats")
    assert (result.status, result.err) == (0, "")
    assert re.search(said, result.out, re.MULTILINE), result.out
    assert "nothing odd" not in result.out
    json.loads(run("inspect", tmp_path, "--stats", "--json").out, parse_constant=lambda word: pytest.fail(word))


def test_cloned_experts_and_duplicates(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "llama", "experts: [seed, code, seed]\nrules: [{roles: [norm.final], make: copy, from: law}]", "btx")
    document = json.loads(run("inspect", folder, "--stats", "--json").out)
    assert document["clones"] == [{"of": "ffn", "expert": 2, "equals": 0}]
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (0, 2)]
    assert names in document["duplicates"]
    assert len(document["duplicates"]) == 6
    text = run("inspect", folder, "--stats").out
    assert "ffn expert 2 equals expert 0 in every tensor" in text
    assert "and 1 more group" in text


def test_stats_of_a_mixture(tmp_path: Path, run: Any) -> None:
    text = run("inspect", mixture(tmp_path, "llama"), "--stats").out
    assert re.search(r"router\.attn\s+normal", text)
    assert "▁" in text
    everything = run("inspect", tmp_path / "out", "--stats", "--all").out
    assert everything.count("std 0.") > text.count("std 0.") > 10
    assert "router.ffn 1 " in everything
    record = inspect(tmp_path / "out", tensors="model.norm.weight", stats=True).document()["tensors"][0]["stats"]
    values = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].astype(float)
    assert record["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert record["std"] == pytest.approx(values.std(), rel=1e-10)


# ---- damaged and strange


def test_an_incomplete_model_is_described(tmp_path: Path, run: Any) -> None:
    folder = edit(dense(tmp_path), ("model.layers.1.mlp.up_proj.weight",), {"extra.thing": numpy.zeros(3, "f4")})
    result = run("inspect", folder)
    assert result.status == 0
    findings = result.out.partition("findings")[2]
    assert "model.layers.1.mlp.up_proj.weight missing: 1 tensor" in " ".join(findings.split())
    document = json.loads(run("inspect", folder, "--json").out)
    assert (document["missing"], document["unknown"]) == (["model.layers.1.mlp.up_proj.weight"], ["extra.thing"])
    assert document["parameters"]["by_role"]["unknown"] == 3


def test_unknown_architectures_list_and_count(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"h.0.w": numpy.zeros((2, 3), "f4"), "h.1.w": numpy.zeros((2, 3), "f4"), "wte": numpy.zeros((5, 4), "f2")}, path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigger"}')
    result = run("inspect", tmp_path)
    assert result.status == 0
    assert "unknown architecture" in result.out
    assert re.search(r"2 x h\.\{0-1\}\. +6$", result.out, re.MULTILINE)
    document = json.loads(run("inspect", tmp_path, "--json").out)
    assert (document["parameters"]["total"], document["parameters"]["active"], document["layers"]) == (32, None, None)
    assert run("inspect", path).status == 0


NASTY = {
    "esc": "a\x1b[31mred\x1b]0;title\x07", "newline": "line\nbreak", "path": "../../etc/passwd", "metadata": "__metadata", "bidi": "a\u202eb",
    "long": "x" * 100_000, "empty": "", "numbers": "a.99999999999999999999.b.1.c",
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("option", ["", "--all", "--stats", "--json", "--tensors=*"])
def test_nasty_names_never_reach_the_terminal(name: str, option: str, tmp_path: Path, run: Any) -> None:
    raw = json.dumps({NASTY[name]: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    result = run("inspect", path, *([option] if option else []))
    assert result.status == 0, result.err
    assert not set(result.out) & set("\x1b\x07\u202e")
    assert "line\nbreak" not in result.out
    if option != "--json":
        assert len(result.out) < 5000


@pytest.mark.parametrize(("content", "message"), [
    (b"\x80\x02}q\x00.", "a Python pickle, which is never loaded"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    (b"<!doctype html>", "an HTML or XML page"),
    (b"PK\x03\x04 rest", "a zip archive"),
    (b"GGUF\x03\0\0\0", "a GGUF file"),
    (b"", "0 bytes, too short"),
    (b"1234567", "7 bytes, too short"),
    ((2**63).to_bytes(8, "little") + b"{}", "promise a header of"),
    ((4).to_bytes(8, "little") + b"[1]\xff", "does not begin with"),
    ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "nested too deeply"),
])  # fmt: skip
def test_bad_files_are_explained(content: bytes, message: str, tmp_path: Path, run: Any) -> None:
    """A file by itself; folders are in test_unreadable.py."""
    path = dense(tmp_path) / "model.safetensors"
    path.write_bytes(content)
    result = run("inspect", path)
    assert (result.status, result.out) == (2, "")
    assert message in result.err


def test_what_is_no_model(tmp_path: Path, run: Any) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "folder").mkdir()
    broken = dense(tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "llama", "model_type": "x"}')
    pickled = dense(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for path, message in (
        (tmp_path / "nothing", "no such folder"), (fifo, "not a regular file"), (tmp_path / "folder", "config.json is missing"),
        (broken, "stands twice"), (pickled, "Pickled weights are never loaded"),
    ):  # fmt: skip
        result = run("inspect", path)
        assert (result.status, result.out) == (2, ""), path
        assert message in result.err


def test_a_shard_that_is_not_there(tmp_path: Path, run: Any) -> None:
    dense(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    result = run("inspect", tmp_path)
    assert result.status == 2
    assert "1 of 3 files that model.safetensors.index.json names are missing: model-00002-of-00003.safetensors" in result.err
    assert run("inspect", tmp_path / "model-00001-of-00003.safetensors").status == 0


def test_quantised_weights_are_described(tmp_path: Path, run: Any) -> None:
    result = run("inspect", edit(dense(tmp_path), quantization_config={"quant_method": "fp8"}))
    assert result.status == 0
    assert "config.json has a quantization_config" in result.out


# ---- light


def test_headers_need_neither_torch_nor_numpy(tmp_path: Path) -> None:
    folder = mixture(tmp_path, "llama")
    for arguments in (["--as-bam", "4"], ["--json"], ["--layer", "1"], ["--where", "law:*"]):
        target = tmp_path / "seed" if "--as-bam" in arguments else folder
        code = (
            f"import sys; sys.argv = ['bam-merge', 'inspect', {str(target)!r}, *{arguments!r}]\n"
            "from bam_merge.cli import main\nmain()\n"
            "print({'torch', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("arguments", [["inspect", "out", "--stats"], ["diff", "seed", "code"], ["diff", "code", "law", "--seed", "seed"]])
def test_values_need_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    """Statistics of every tensor, the routers among them, and comparisons: numpy starts in a tenth of the time."""
    mixture(tmp_path, "llama")
    code = (
        f"import sys; sys.argv = ['bam-merge', *{arguments!r}]\n"
        "from bam_merge.cli import main\n"
        "try: main()\nexcept SystemExit as done: assert done.code == 1, done\n"
        "assert 'numpy' in sys.modules\nprint({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) > 10 and done.stdout.splitlines()[-1] == "set()"
    assert arguments[0] == "diff" or "router" in done.stdout
