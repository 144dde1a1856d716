"""One of the processes of test_exported_parallel.py: `tensor_parallel.py WORK ...`, run by torch.distributed.run on the CPU.

Loads the model WORK/bam cut over all processes, and writes to each WORK how far the loss and every gradient are from those of one process
(WORK/expected.pt), once by the model's plan and once without its rule for the gates, and the tensors as saved.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def errors(folder: Path, expected: dict[str, Any], save: Path | None, **plan: Any) -> dict[str, float]:
    config = DistributedConfig(tp_size=dist.get_world_size(), **plan)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, distributed_config=config).train()
    loss = model(expected["tokens"], labels=expected["tokens"]).loss
    loss.backward()
    found = {"loss": abs(float(loss.detach() - expected["loss"]))}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        found[name] = float((gradient - expected[name]).abs().max() / expected[name].abs().max())
    if save is not None:
        model.save_pretrained(save)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for work in map(Path, sys.argv[1:]):
        expected = torch.load(work / "expected.pt")
        by_plan = errors(work / "bam", expected, work / "saved")
        without_gates = errors(work / "bam", expected, None, tp_plan={"model.layers.*.self_attn.gates": "replicate"})
        (work / f"errors-{dist.get_rank()}.json").write_text(json.dumps([by_plan, without_gates]))
    dist.destroy_process_group()
