"""`bam-merge export gguf`: a converter's file is read back, every fault in it is found, and what llama.cpp would not compute is refused."""

import errno
import json
import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED
from safetensors.numpy import load_file, save_file
from vocabularies import SETTINGS, put, tokenizer_json

from bam_merge import load_recipe, merge
from bam_merge.errors import BamMergeError
from bam_merge.exporting import converter as converters
from bam_merge.exporting import gguf as exporting
from bam_merge.exporting.gguf import export_gguf

gguf = pytest.importorskip("gguf")

CONVERTER = str(Path(__file__).with_name("converter.py"))
RAW, RENORMALISED = "ffn: {gate: softmax_then_topk}", "ffn: {gate: topk_then_softmax}"


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in imports less than the converter."""
    monkeypatch.setattr(converters, "NEEDED", {"gguf": "gguf"})


def mixture(
    folder: Path,
    layout: str = "mixtral",
    family: str = "llama",
    text: str = RENORMALISED,
    method: str = "btx",
    tokenizer: bool = True,
    **keys: Any,
) -> Path:
    names = ("seed", "code", "law")
    write_sources(folder, {**CONFIGS[family], **keys})
    for name in names if tokenizer else ():
        put(folder / name, {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {**SETTINGS, "chat_template": "{{ messages }}"}})
    return merge(load_recipe(write_recipe(folder, text, method, names, f"{{path: out, layout: {layout}}}")), options=UNPROVED)


@pytest.mark.parametrize("dtype", ["source", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("layout", "family", "text"), [
    ("mixtral", "llama", RENORMALISED), ("mixtral", "llama_tied", RENORMALISED), ("qwen3_moe", "qwen3", RENORMALISED),
    ("qwen2_moe", "qwen2", RAW), ("qwen2_moe", "llama", RAW), ("qwen2_moe", "qwen2", f"{RAW[:-1]}, shared_expert: seed}}"),
])  # fmt: skip
def test_what_the_converter_wrote_is_what_the_folder_has(layout: str, family: str, text: str, dtype: str, tmp_path: Path, run: Any) -> None:
    folder, file = mixture(tmp_path, layout, family, text), tmp_path / "m.gguf"
    done = run("export", "gguf", folder, file, "--dtype", dtype, "--converter", CONVERTER)
    assert done.status == 0, done.err
    reader = gguf.GGUFReader(file)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"source": {"F32"}, "float32": {"F32"}, "float16": {"F16", "F32"}, "bfloat16": {"BF16", "F32"}}[dtype]
    assert f"{len(reader.tensors)} tensors" in done.out and "metadata" in done.out
    stored = load_file(folder / "model.safetensors")
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight").data
    name = {"mixtral": "block_sparse_moe.experts.2.w2"}.get(layout, "mlp.experts.2.down_proj")
    if kinds == {"F32"}:
        assert (down[2] == stored[f"model.layers.1.{name}.weight"]).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".bam-merge")]


@pytest.mark.parametrize(("fault", "said"), [
    ("value", "blk.0.attn_output.weight: 1 of 1024 values differ"),
    ("not in pairs", "blk.0.attn_q.weight: "),
    ("experts", "blk.0.ffn_gate_exps.weight, expert 0: "),
    ("left out", "blk.1.attn_v.weight is missing"),
    ("extra", "blk.0.attn_sinks.weight: no tensor of the folder is stored so"),
    ("epsilon", "llama.attention.layer_norm_rms_epsilon is "),
    ("no top_k", "llama.expert_used_count is missing, expected 2"),
    ("a scale", "llama.logit_scale is 2.0, expected 1.0"),
    ("a key", "llama.of_tomorrow = 3 stands for nothing in config.json"),
    ("token", "2 tokens differ, the first is 3: 'c', expected 'b'"),
    ("fewer tokens", "tokenizer.ggml.tokens has 63 tokens, expected one for each of 64 rows"),
    ("merge", "tokenizer.ggml.merges are not those of tokenizer.json"),
    ("bos", "tokenizer.ggml.bos_token_id is 1, '</s>'; tokenizer_config.json has '<s>'"),
    ("template", "tokenizer.chat_template is not the folder's"),
    ("cut off", "cannot be read"),
    ("says NotImplementedError: BPE pre-tokenizer was not recognized - update it", "does not know this tokenizer"),
    ("says KeyError: no such thing", "says: KeyError: no such thing"),
])  # fmt: skip
def test_every_fault_of_the_file_is_found_and_no_file_appears(
    fault: str, said: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = mixture(tmp_path), tmp_path / "m.gguf"
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv("FAULT", fault)
    done = run("export", "gguf", folder, file, "--converter", CONVERTER)
    assert done.status == 2 and said in done.err, done.err
    assert sorted(tmp_path.iterdir()) == before


def test_values_beyond_float16_are_said(tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name] * 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BamMergeError, match=r"blk\.0\.attn_output\.weight: holds values up to .* beyond float16\. Use --dtype bfloat16"):
        export_gguf(folder, tmp_path / "m.gguf", dtype="float16", converter=CONVERTER)


@pytest.mark.parametrize(("layout", "family", "text", "method", "said"), [
    ("bam", "llama", "", "bam", "layout bam: llama.cpp: does not convert: it knows no such architecture"),
    ("qwen3_moe", "qwen3", RAW, "btx", "norm_topk_prob is False: llama.cpp always renormalises gates"),
    ("qwen2_moe", "qwen2", RENORMALISED, "btx", "norm_topk_prob is True: llama.cpp never renormalises gates"),
    ("mixtral", "mistral", RENORMALISED, "btx", "sliding is all: llama.cpp attends to all tokens before"),
    ("mellum", "qwen3", RENORMALISED, "btx", "llama.cpp is expected to run it (it has the architecture mellum), but what its tensors are called"),
    ("gemma4", "gemma4_text", RENORMALISED, "btx", "llama.cpp is expected to run it (it has the architecture gemma4), but what its tensors are called"),
    ("llama", "llama", "", "merge", "model_type 'llama' is no layout of mixtures that is known here"),
])  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(
    layout: str, family: str, text: str, method: str, said: str, tmp_path: Path, run: Any
) -> None:
    done = run("export", "gguf", mixture(tmp_path, layout, family, text, method), tmp_path / "m.gguf", "--converter", CONVERTER)
    assert done.status == 2 and said in done.err, done.err
    assert not (tmp_path / "m.gguf").exists()


def test_all_that_is_wrong_is_said_together(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixture(tmp_path, "qwen3_moe", "qwen3", RAW, tokenizer=False)
    monkeypatch.setattr(converters, "NEEDED", {"gguf": "gguf", "no_such_module": "sentencepiece"})
    monkeypatch.setattr(converters.shutil, "which", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"mine")
    done = run("export", "gguf", folder, tmp_path / "m.gguf")
    assert done.status == 2
    for text in (
        "m.gguf: exists. Choose another name, or replace it with --force", "sentencepiece is not installed", "pip install 'bam-merge[gguf]'",
        "llama.cpp's converter is not on the PATH", "norm_topk_prob is False", "no tokenizer.json or tokenizer.model", "5 problems",
    ):  # fmt: skip
        assert text in done.err, done.err
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize(("file", "said"), [
    ("nowhere/m.gguf", "there is no folder"), ("seed", "is a folder, expected the name of a file"),
])  # fmt: skip
def test_places_where_no_file_can_be(file: str, said: str, tmp_path: Path, run: Any) -> None:
    done = run("export", "gguf", mixture(tmp_path), tmp_path / file, "--converter", CONVERTER)
    assert done.status == 2 and said in done.err


def test_force_replaces_no_pipe(tmp_path: Path, run: Any) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    done = run("export", "gguf", mixture(tmp_path), tmp_path / "m.gguf", "--converter", CONVERTER, "--force")
    assert done.status == 2 and "m.gguf: is a device, pipe or socket, which no file takes the place of" in done.err
    assert (tmp_path / "m.gguf").is_fifo()


def test_no_room(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written; and of a disk that others fill meanwhile, in words and not in the converter's alone."""
    folder, file = mixture(tmp_path), tmp_path / "m.gguf"
    monkeypatch.setenv("FAULT", "says OSError: [Errno 28] No space left on device")
    done = run("export", "gguf", folder, file, "--converter", CONVERTER)
    assert done.status == 2 and "there is no room for the file that llama.cpp's converter writes. Free some space" in done.err
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    done = run("export", "gguf", folder, file, "--converter", CONVERTER)
    assert done.status == 2 and f"{tmp_path}: 10 kB free, the file takes " in done.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".bam-merge", "m.gguf"))]


def test_a_folder_that_takes_no_file(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**place: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some name")

    monkeypatch.setattr(exporting.tempfile, "TemporaryDirectory", refuse)
    done = run("export", "gguf", mixture(tmp_path), tmp_path / "m.gguf", "--converter", CONVERTER)
    assert (done.status, done.err) == (
        2, f"error: {tmp_path}: Read-only file system, so no file can be made there. Choose another FILE.\n"
    )  # fmt: skip


def test_force_replaces_the_file(tmp_path: Path, run: Any) -> None:
    folder, file = mixture(tmp_path), tmp_path / "m.gguf"
    file.write_bytes(b"old")
    assert run("export", "gguf", folder, file, "--converter", CONVERTER, "--force").status == 0
    assert file.read_bytes()[:4] == b"GGUF"


def test_a_converter_that_is_not_there(tmp_path: Path, run: Any) -> None:
    done = run("export", "gguf", mixture(tmp_path), tmp_path / "m.gguf", "--converter", tmp_path)
    assert done.status == 2 and f"--converter {tmp_path}: there is no convert_hf_to_gguf.py" in done.err


def test_a_folder_that_lacks_what_llama_cpp_needs(tmp_path: Path, run: Any) -> None:
    folder = mixture(tmp_path, "qwen2_moe", "qwen2", RAW)
    tensors = load_file(folder / "model.safetensors")
    gates = [name for name in tensors if name.endswith("shared_expert_gate.weight")]
    save_file({name: values * (name not in gates) for name, values in tensors.items()}, folder / "model.safetensors")
    done = run("export", "gguf", folder, tmp_path / "m.gguf", "--converter", CONVERTER)
    assert done.status == 2 and "llama.cpp computes the gate as 0/0" in done.err


def test_needed_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converters, "find_spec", lambda name: ModuleSpec(name, None) if name == "transformers" else None)
    monkeypatch.setattr(converters, "NEEDED", {"gguf": "gguf", "transformers": "transformers", "sentencepiece": "sentencepiece"})
    assert converters.missing_packages() == [
        "gguf and sentencepiece are not installed, which llama.cpp's converter imports: pip install 'bam-merge[gguf]'."
    ]


def test_rotary_scaling_is_compared(tmp_path: Path, run: Any) -> None:
    """The stand-in writes none: a model that has one is not what it wrote."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    done = run("export", "gguf", mixture(tmp_path, rope_parameters=rope), tmp_path / "m.gguf", "--converter", CONVERTER)
    assert "llama.rope.scaling.type is missing, expected yarn" in done.err
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    done = run("export", "gguf", mixture(tmp_path / "3", rope_parameters=llama3), tmp_path / "m.gguf", "--converter", CONVERTER)
    assert "rope_freqs.weight is missing, and rope_type is llama3" in done.err


def test_the_card_s_folder_is_not_changed(tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = export_gguf(folder, tmp_path / "m.gguf", converter=CONVERTER)
    assert made.notes == () and made.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mixtral"
