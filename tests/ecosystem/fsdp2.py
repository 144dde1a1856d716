"""One process of test_fsdp2: the gradients of this process's rows under FSDP2, gathered whole into gradients.pt."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM


def main(folder: str, where: str) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin  # not chosen on processors by itself
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if len(sharded) != len(list(model.parameters())):
        raise SystemExit("parameters are left that FSDP2 has not sharded")
    half = torch.load(Path(where, "batch.pt")).chunk(accelerator.num_processes)[accelerator.process_index]
    accelerator.backward(model(input_ids=half, labels=half).loss)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if accelerator.is_main_process:
        torch.save(gradients, Path(where, "gradients.pt"))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
