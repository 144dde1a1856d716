"""What a model card shows of other projects: PEFT, torch's ONNX export, vLLM, llama.cpp's converter. Each where it is installed."""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from card_snippets import KINDS, about, merged, snippets

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]

IDS = torch.tensor([[1, 2, 3, 4]])


def run(text: str, **names: Any) -> dict[str, Any]:
    exec(compile(text, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_lora_as_shown(kind: str, tmp_path: Path) -> None:
    """Attention and every expert are adapted, of layout bam no router is, and nothing is changed before a step."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = merged(tmp_path, kind)
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        before = base(IDS).logits
        model = run(about(folder, "LoRA"), model=base)["model"].eval()
        assert torch.equal(model(IDS).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if "router" in name or (kind.startswith("bam") and ".gate." in name)]
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp" if kind == "dense" else "experts"):
        assert [name for name in trained if part in name], part
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_as_shown(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's logits, computed by onnxruntime, are the model's."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    folder = merged(tmp_path, kind)
    model = run(about(folder, "ONNX"))["model"]
    (logits,) = runtime.InferenceSession("model.onnx").run(["logits"], {"input_ids": IDS.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_vllm_as_shown(kind: str, tmp_path: Path) -> None:
    """vLLM's command line takes the command, and its engine the folder."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    folder = merged(tmp_path, kind)
    words = shlex.split(about(folder, "vLLM", "console"))
    assert words == ["vllm", "serve", str(folder)]
    script = f"from vllm import LLM\nLLM({str(folder)!r}, enforce_eager=True, max_model_len=64).generate('a b')\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_gguf_as_shown(kind: str, tmp_path: Path) -> None:
    folder = merged(tmp_path, kind)
    command = snippets(folder, "console")["GGUF, by llama.cpp's converter"]
    if (converter := which("convert_hf_to_gguf.py")) is None:
        pytest.skip("convert_hf_to_gguf.py is not on the PATH")
    words = shlex.split(command.replace("convert_hf_to_gguf.py", converter, 1))
    subprocess.run([sys.executable, *words[1:]], check=True, timeout=600, cwd=tmp_path)
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
