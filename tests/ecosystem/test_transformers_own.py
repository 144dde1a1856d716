"""transformers' own tests of a model (ModelTesterMixin of its source package), run against BamModel and BamForCausalLM. `make test-ecosystem`.

The source package of the installed version is downloaded once, into build/, and never committed. It has the tests that all models share, not
the two files of generation and export tests that these import: empty classes stand for them. What fails is listed with its reason in
transformers_suite.py; anything else that fails is a failure, and so is a listed test that passes.
"""

import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge.planning.make import plan_file

pytestmark = pytest.mark.ecosystem

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "build" / "transformers-own-tests"
LEAST = 100
"""Tests that pass at least: a suite of which most are skipped shows nothing."""

MIXED = "rules: [{roles: [attn.k, attn.v, attn.k_norm, attn.k.bias, attn.v.bias], layers: 0, make: mean}]"
TOP_2 = "attention: {routing: top_k, top_k: 2}\nffn: {top_k: 2, gate: topk_then_softmax}"
CASES = {
    "Expert-KV": ("llama", "bam", ""),
    "Shared-KV, tied": ("llama_tied", "bam", "attention: {kv: shared}"),
    "BTX": ("qwen3", "btx", ""),
    "BTX with biases, gates of more than one": ("llama_biased", "btx", "ffn: {top_k: 2, gate: softmax_then_topk, gate_scale: 1.5}"),
    "top-2, parallel with one norm": ("cohere_qk_norm", "bam", TOP_2),
    "keys shared in one layer, biases": ("qwen3_biased", "bam", MIXED),
    "windows": ("mistral", "bam", TOP_2),
    "post-norm": ("olmo2", "bam", "attention: {kv: shared}"),
    "parallel with two layer norms, no gate in the FFN": ("gpt_neox", "bam", ""),
    "layer norms with an offset": ("nemotron", "bam", ""),
    "norms without weights, clipped": ("olmo_clipped", "btx", ""),
    "capped": ("gemma2", "bam", ""),
    "two rotary embeddings": ("gemma3_text", "bam", ""),
    "layers that do not turn": ("smollm3", "bam", "attention: {kv: shared, routing: top_k, top_k: 2}"),
    "scaled": ("granite_biased", "bam", ""),
    "norms after the rotation": ("hunyuan_v1_dense", "bam", ""),
    "queries that grow": ("ministral3", "bam", ""),
    "one key and value head": ("falcon", "btx", ""),
    "layers of a state": ("qwen3_5_text", "bam", TOP_2),
    "layers of a state, BTX": ("qwen3_5_text_biased", "btx", ""),
    "sizes of two kinds of layers": ("gemma4_text", "bam", TOP_2),
    "keys that are values too": ("gemma4_text_keys", "bam", ""),
}
"""Family, method and sections of the recipe of each kind of model."""

CASES |= {f"as it comes, {name}": (name, "bam", "") for name in CONFIGS if (name, "bam", "") not in CASES.values()}

MORE = {
    **{name: {"rotary_pct": 0.5} for name in ("gpt_neox", "gpt_neox_sequential")},
    **{name: {"global_head_dim": 16} for name in ("gemma4_text", "gemma4_text_keys", "gemma4_unified_text")},
    **{name: {"partial_rotary_factor": 0.5} for name in ("phi_tied", "stablelm", "stablelm_qk_norm", "stablelm_parallel")},
}
"""Keys of a family's config: of a single rotary pair the tests cannot ask for dynamic scaling, which divides by nothing then."""


@pytest.fixture(scope="session")
def theirs() -> Path:
    """A folder with transformers' tests as the package `theirs`. Skips where no index has the source package."""
    release = version("transformers")
    folder = CACHE / release
    if not (folder / "theirs").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, f"transformers=={release}"], capture_output=True, text=True)
        archives = sorted(folder.glob("transformers-*.tar.gz"))
        if done.returncode or not archives:
            pytest.skip(f"no source package of transformers {release} to be had: {done.stderr.strip()[-300:]}")
        staged = folder / "unpacked"
        with tarfile.open(archives[0]) as archive:
            member = f"transformers-{release}/tests/test_modeling_common.py"
            archive.extract(member, staged, filter="data")
        for name, stub in (("generation/test_utils", "GenerationTesterMixin"), ("exporters/test_export", "ExportTesterMixin")):
            path = staged / "theirs" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"class {stub}:\n    pass\n")
        (staged / member).rename(staged / "theirs" / "test_modeling_common.py")
        (staged / "theirs").rename(folder / "theirs")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_models_pass_what_transformers_asks_of_its_own(name: str, theirs: Path, tmp_path: Path) -> None:
    family, method, sections = CASES[name]
    write_sources(tmp_path, {**CONFIGS[family], **MORE.get(family, {})})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dict(plan_file(write_recipe(tmp_path, sections, method)).config)))
    report, suite = tmp_path / "report.xml", Path(__file__).parent / "transformers_suite.py"
    given = {"BAM_SUITE": str(theirs), "BAM_CONFIG": str(config), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, "--tb=short", "--show-capture=no", f"--junitxml={report}", str(suite)],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout[-4000:]
    (counted,) = ElementTree.parse(report).getroot().iter("testsuite")
    passed = int(counted.get("tests", 0)) - sum(int(counted.get(kind, 0)) for kind in ("failures", "errors", "skipped"))
    assert passed >= LEAST, done.stdout[-2000:]
