"""The exported model cut over two processes: the same loss, the same gradients, the same tensors when saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from packaging.version import Version
from test_exported import KINDS, MIXED, assert_same_tensors, load
from test_model import build, ids, write_three

transformers = pytest.importorskip("transformers")
WORKER = Path(__file__).parent / "tensor_parallel.py"

needs_styles = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="earlier transformers have no styles of tensor parallelism for norms and gates",
)

CASES = {
    "keys shared in one layer": ("qwen3_biased", MIXED),
    "top-2, layer norm of heads": ("cohere_qk_norm", KINDS["Shared-KV, top-2"][1]),
    "biases": ("gpt_neox", ""),
    "a norm of all heads": ("olmo2", ""),
}
WHOLE = {"a norm of all heads"}
"""Attention that no process can have a part of: all have all of it, and there is no rule for the gates."""


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, set[str]]]:
    """Of every case its folder of work and the names of its gradients, after two processes, started once, have gone through all cases."""
    made = {}
    for case, (family, text) in CASES.items():
        work = tmp_path_factory.mktemp("cut")
        write_three(work, CONFIGS[family])
        model, tokens = load(build(work, text)).train(), ids()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"tokens": tokens, "loss": loss.detach(), **gradients}, work / "expected.pt")
        made[case] = work, set(gradients)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER]
    done = subprocess.run([*launch, *(work for work, _ in made.values())], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@needs_styles
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(case: str, cut: dict[str, tuple[Path, set[str]]]) -> None:
    """And without the plan's rule for the gates they have not: each process knows its own heads' part only."""
    work, gradients = cut[case]
    for rank in range(2):
        by_plan, without_gates = json.loads((work / f"errors-{rank}.json").read_text())
        assert by_plan.keys() == {"loss", *gradients}
        assert {name: error for name, error in by_plan.items() if error > 1e-4} == {}
        assert (without_gates["model.layers.0.self_attn.router.weight"] > 0.01) == (case not in WHOLE)
    assert_same_tensors(work / "bam", work / "saved")


def test_heads_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    """A part that ends inside an expert's key head would be fused wrongly; the conversion names the remedy."""
    from bam_merge.exported.modeling_bam import BamFuseHeads

    write_three(tmp_path, CONFIGS["llama"])
    config = load(build(tmp_path, "")).config
    half_a_head = {"q": [torch.zeros(config.head_dim, 32)] * 3}
    with pytest.raises(ValueError, match=r"num_key_value_heads_per_expert must be a multiple of the processes .* \(tp_size\)"):
        BamFuseHeads("query").convert(half_a_head, ["q"], ["fused"], config=config)
