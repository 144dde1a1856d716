"""Every row of what is served, in each engine: the tokens and log-probabilities of transformers, or a plan that says it is not so.

Opt-in, `make test-serving`; BAM_MERGE_VLLM_PYTHON and BAM_MERGE_LLAMA_PYTHON name a Python that has vLLM, and one that has llama-cpp-python
beside this package's requirements with its extra gguf, BAM_MERGE_CONVERTER llama.cpp's converter, BAM_MERGE_PRETRAINED a folder with the
model `seed`, whose tokenizer the small models have, and its branches. `--junitxml FILE` records each row's figures.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, TOKENS, Made, compared, run_engine, said
from rows import ROWS

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
ALL = len(PROMPTS) * TOKENS
CLOSE = 1e-4
"""The most that log-probabilities of float32 models are apart, whose rounding differs (1e-5 to 5e-5 was measured)."""

NO_BRANCHES = "the pretrained model has no branches: `make example` makes them"


@pytest.fixture(scope="session")
def vllm(made: Mapping[str, Made], vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    """What vLLM says, by row."""
    jobs = [[str(item.folder), item.reference.ids, TOKENS, "auto_map" in item.plan.config] for item in made.values()]
    lines = run_engine(vllm_python, "in_vllm.py", jobs, tmp_path_factory.mktemp("vllm"))
    return {name: lines[str(item.folder)] for name, item in made.items()}


@pytest.fixture(scope="session")
def llama(
    made: Mapping[str, Made], llama_python: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[str, Any]]:
    """What llama.cpp says, by row; `failed` with the words of the export where that refuses."""
    folder, files, refusals = tmp_path_factory.mktemp("gguf"), {}, {}
    for name, item in made.items():
        file = folder / f"{item.folder.parent.name}.gguf"
        command = [llama_python, "-m", "bam_merge", "export", "gguf", item.folder, file, "--dtype", "float32", "--converter", converter]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=1200)
        if done.returncode == 0:
            files[name] = str(file)
        else:
            refusals[name] = {"failed": f"export: {done.stderr.strip()[-500:]}"}
    jobs = [[file, made[name].reference.ids, TOKENS, PROMPTS] for name, file in files.items()]
    lines = run_engine(llama_python, "in_llama.py", jobs, tmp_path_factory.mktemp("llama"))
    return {**refusals, **{name: lines[file] for name, file in files.items()}}


def held(name: str, word: str, item: Made, line: dict[str, Any], record: Callable[[str, object], None]) -> None:
    """The engine computes the row as transformers does where the plan says so, and does not where the plan says that."""
    (verdict,) = [found for found in item.plan.serves if found.word == word]
    found = said(line)
    same, apart = compared(found, item.reference) if found else (0, float("inf"))
    words = f"{name} in {verdict.name}: {same}/{ALL}, {apart:.1e}" + ("" if found else f", {line['failed'].strip()[-300:]}")
    record(word, words)
    if not verdict.serves:
        assert same < ALL or apart > CLOSE, f"{words}: the plan says that it is not served: {verdict.reasons}"
        return
    assert found is not None, words
    assert (same, apart <= CLOSE) == (ALL, True), words
    if word == "gguf":
        assert found.ids == item.reference.ids, "llama.cpp cuts the prompts otherwise"


@pytest.mark.parametrize("name", ROWS)
def test_in_vllm(name: str, made: Mapping[str, Made], vllm: Mapping[str, dict[str, Any]], record_property: Any) -> None:
    if name not in made:
        pytest.skip(NO_BRANCHES)
    held(name, "vllm", made[name], vllm[name], record_property)


@pytest.mark.parametrize("name", ROWS)
def test_in_llama_cpp(name: str, made: Mapping[str, Made], llama: Mapping[str, dict[str, Any]], record_property: Any) -> None:
    """Where the plan says that llama.cpp does not compute it, the export refuses it in the plan's words."""
    if name not in made:
        pytest.skip(NO_BRANCHES)
    if "is expected to run it" in line_of(llama[name]):
        pytest.skip(f"{name}: not exported here: {line_of(llama[name])[-300:]}")
    held(name, "gguf", made[name], llama[name], record_property)
    (verdict,) = [found for found in made[name].plan.serves if found.word == "gguf"]
    assert all(reason in line_of(llama[name]) for reason in verdict.reasons if not reason.startswith("does not"))


def line_of(line: dict[str, Any]) -> str:
    return str(line.get("failed", ""))
