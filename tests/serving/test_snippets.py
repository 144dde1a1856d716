"""What the card and the how-to show of vLLM and llama.cpp, carried out: a server on this machine alone, and the converter."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from engines import PROMPTS, TOKENS, Made

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]


def shown(item: Made, start: str) -> list[str]:
    """The words of the one command of the card that begins so, with the folder's name."""
    (line,) = re.findall(rf"^{re.escape(start)}.*$", (item.folder / "README.md").read_text(), re.MULTILINE)
    return shlex.split(line.replace("THIS_FOLDER", str(item.folder)))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("name", ["mixtral", "bam, Expert-KV"])
def test_vllm_serves_as_shown(name: str, made: Mapping[str, Made], vllm_python: Path, tmp_path: Path) -> None:
    """The server answers with the tokens that transformers gives, and to a chat. (Its script is named by another distribution on CPU.)"""
    item, port = made[name], free_port()
    words = shown(item, "vllm serve")
    assert words[:3] == ["vllm", "serve", str(item.folder)]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    command = [
        vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", words[2], *words[3:], "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "4",
    ]  # fmt: skip
    ids = item.reference.ids[0]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings, "PYTHONPATH": ""})
    try:
        wait(server, port, tmp_path / "log")
        asked = {
            "model": "m",
            "prompt": ids,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = ask(port, "completions", asked)
        assert answer["choices"][0]["token_ids"] == item.reference.tokens[0]
        chat = ask(
            port,
            "chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": PROMPTS[3]}], "max_tokens": 4, "temperature": 0},
        )
        assert chat["usage"]["completion_tokens"] >= 1
    finally:
        server.terminate()
        server.wait(60)


def wait(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Until the server answers."""
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def ask(port: int, what: str, document: dict[str, object]) -> Any:
    request = Request(f"http://127.0.0.1:{port}/v1/{what}", json.dumps(document).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_converter_as_shown(name: str, made: Mapping[str, Made], llama_python: Path, converter: Path, tmp_path: Path) -> None:
    words = shown(made[name], "python convert_hf_to_gguf.py")
    script = converter / "convert_hf_to_gguf.py" if converter.is_dir() else converter
    subprocess.run([llama_python, script, *words[2:]], cwd=tmp_path, check=True, capture_output=True, timeout=1200)
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
