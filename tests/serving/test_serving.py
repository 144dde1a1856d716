"""Every row of what is served, in each engine: the tokens and log-probabilities of transformers, or a plan that says it is not so.

Opt-in, `make test-serving`; BAM_MERGE_VLLM_PYTHON and BAM_MERGE_LLAMA_PYTHON name a Python that has vLLM, and one that has llama-cpp-python
beside this package with its extra gguf, BAM_MERGE_CONVERTER llama.cpp's converter, BAM_MERGE_PRETRAINED a folder with the model `seed`, whose
tokenizer the small models have, and its branches.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, TOKENS, Said, compared, environment, run_engine, said, transformers_says
from rows import PRETRAINED, ROWS, make

from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
ALL = len(PROMPTS) * TOKENS
CLOSE = 1e-4
"""The most that log-probabilities of float32 models are apart, whose rounding differs (1e-5 to 5e-5 was measured)."""


@dataclass(frozen=True)
class Made:
    """A row, merged: its folder, its plan, and what transformers says."""

    folder: Path
    plan: Plan
    reference: Said


@pytest.fixture(scope="session")
def pretrained() -> Path:
    folder = Path(os.environ.get("BAM_MERGE_PRETRAINED", ROOT / "checkpoints"))
    if not (folder / "seed" / "tokenizer.json").exists():
        pytest.skip(f"{folder}/seed has no tokenizer.json: examples/smollm2/get_seed.py makes one, or BAM_MERGE_PRETRAINED names one")
    return folder


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Mapping[str, Made]:
    """Every row that a selected test is about."""
    wanted = {item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec") and "made" in item.fixturenames}
    found = {}
    for place, name in enumerate(name for name in ROWS if name in wanted):
        row, folder = ROWS[name], tmp_path_factory.getbasetemp() / f"row{place}"
        if row.family == PRETRAINED and not all((pretrained / source / "model.safetensors").exists() for source in row.names):
            continue
        out = make(row, folder, pretrained)
        plan = plan_file(folder / "recipe.yaml")
        found[name] = Made(out, plan, transformers_says(out, "auto_map" in plan.config))
    return found


def python_of(engine: str) -> Path:
    found = environment(engine)
    if found is None:
        pytest.skip(f"no environment has {engine}: `make test-serving` makes one where its packages install")
    return found


@pytest.fixture(scope="session")
def vllm(made: Mapping[str, Made], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    jobs = [[str(item.folder), item.reference.ids, TOKENS, "auto_map" in item.plan.config] for item in made.values()]
    return run_engine(python_of("vllm"), "in_vllm.py", jobs, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Path | None, str]]:
    """Exports a folder as it is, in the dtype of its tensors: the file, or None with the reason."""
    python, folder = python_of("llama"), tmp_path_factory.mktemp("gguf")

    def export(merged: Path) -> tuple[Path | None, str]:
        file = folder / f"{merged.parent.name}.gguf"
        more = ["--converter", os.environ["BAM_MERGE_CONVERTER"]] if "BAM_MERGE_CONVERTER" in os.environ else []
        command = [python, "-m", "bam_merge", "export", "gguf", merged, file, "--dtype", "float32", *more]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=1200)
        return (file, done.stdout) if done.returncode == 0 else (None, done.stderr)

    return export


@pytest.fixture(scope="session")
def llama(
    made: Mapping[str, Made], gguf: Callable[[Path], tuple[Path | None, str]], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[str, Any]]:
    """What llama.cpp says by row; `failed` where the export refuses."""
    files = {name: gguf(item.folder) for name, item in made.items()}
    jobs = [[str(file), made[name].reference.ids, TOKENS, PROMPTS] for name, (file, _) in files.items() if file is not None]
    lines = run_engine(python_of("llama"), "in_llama.py", jobs, tmp_path_factory.mktemp("llama"))
    return {name: lines[str(file)] if file else {"failed": words} for name, (file, words) in files.items()}


def held(name: str, word: str, made: Mapping[str, Made], line: dict[str, Any], record: Callable[[str, object], None]) -> None:
    """The engine computes the row as transformers does where the plan says so, and does not where the plan says that."""
    (verdict,) = [item for item in made[name].plan.serves if item.word == word]
    found = said(line)
    same, apart = compared(found, made[name].reference) if found else (0, float("inf"))
    words = f"{name} in {verdict.name}: {same}/{ALL}, {apart:.1e}" + ("" if found else f", {line['failed'].strip()[-300:]}")
    record(f"{verdict.word}", words)
    if not verdict.serves:
        assert same < ALL or apart > CLOSE, f"{words}: the plan says that it is not served: {verdict.reasons}"
        return
    assert found is not None, words
    assert (same, apart <= CLOSE) == (ALL, True), words
    if word == "gguf":
        assert found.ids == made[name].reference.ids, "llama.cpp cuts the prompts otherwise"


@pytest.mark.parametrize("name", ROWS)
def test_in_vllm(name: str, made: Mapping[str, Made], request: pytest.FixtureRequest, record_property: Any) -> None:
    if name not in made:
        pytest.skip("the pretrained model has no branches: `make example` makes them")
    lines = request.getfixturevalue("vllm")
    held(name, "vllm", made, lines[str(made[name].folder)], record_property)


@pytest.mark.parametrize("name", ROWS)
def test_in_llama_cpp(name: str, made: Mapping[str, Made], request: pytest.FixtureRequest, record_property: Any) -> None:
    if name not in made:
        pytest.skip("the pretrained model has no branches: `make example` makes them")
    lines = request.getfixturevalue("llama")
    held(name, "gguf", made, lines[name], record_property)
