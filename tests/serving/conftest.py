"""What the tests of serving share: environments, the pretrained model, rows that are merged once."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from engines import Made, environment, transformers_says
from rows import PRETRAINED, ROWS, make

from bam_merge.planning.make import plan_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pretrained() -> Path:
    folder = Path(os.environ.get("BAM_MERGE_PRETRAINED", ROOT / "checkpoints"))
    if not (folder / "seed" / "tokenizer.json").exists():
        pytest.skip(f"{folder}/seed has no tokenizer.json: examples/smollm2/get_seed.py makes one, or BAM_MERGE_PRETRAINED names one")
    return folder


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Mapping[str, Made]:
    """Every row that a selected test is about."""
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec") and item.get_closest_marker("serving")]
    wanted = {spec.params["name"] for spec in specs}
    found = {}
    for place, name in enumerate(name for name in ROWS if name in wanted):
        row, folder = ROWS[name], tmp_path_factory.getbasetemp() / f"row{place}"
        if row.family == PRETRAINED and not all((pretrained / source / "model.safetensors").exists() for source in row.names):
            continue
        out = make(row, folder, pretrained)
        plan = plan_file(folder / "recipe.yaml")
        for source in () if row.family == PRETRAINED else row.names:
            shutil.rmtree(folder / source)  # a hundred rows of four models are a disk
        found[name] = Made(out, plan, transformers_says(out, "auto_map" in plan.config))
    return found


def python_of(engine: str) -> Path:
    found = environment(engine)
    if found is None:
        pytest.skip(f"no environment has {engine}: `make test-serving` makes one where its packages install")
    return found


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    return python_of("vllm")


@pytest.fixture(scope="session")
def llama_python() -> Path:
    return python_of("llama")


@pytest.fixture(scope="session")
def converter() -> Path:
    """llama.cpp's converter, or the folder that has it: what the variable names, or what `make test-serving` unpacked."""
    named = os.environ.get("BAM_MERGE_CONVERTER")
    found = Path(named).resolve() if named else ROOT / ".venv-serving-llama" / "source"
    if not found.exists():
        assert named is None, f"BAM_MERGE_CONVERTER: {found} does not exist"
        pytest.skip("BAM_MERGE_CONVERTER names no converter of llama.cpp: `make test-serving` unpacks one where its packages install")
    return found
