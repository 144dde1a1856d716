"""Times one model's forward passes, in a process of its own, and prints them as JSON on the last line.

    python one_forward.py FOLDER (exported | loop | vllm) DTYPE PROMPT_TOKENS NEW_TOKENS REPEATS [DEVICE]

exported: as transformers loads it, attention by sdpa. loop: bam-merge's reference model, a loop over the experts. vllm: in vLLM, whose
Python runs this then, without compilation and without a cache of prompts.
Prints prompt and generate (the first new token, and all of them: seconds, one value a repeat, after one untimed pass of each), and but for
vllm forward (one pass with the logits of every position) and parameters (counted on the model that runs), and of exported cache_bytes.
On a GPU also device_bytes, the most memory of it that was taken at once, and ends when what was asked of it is done.
Logits that are not all finite are an error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def exported(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Callable[..., Any]]:
    """The model, and how it continues a prompt [B, T]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device).eval()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model, lambda ids_BT, count: model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=count, **greedy)


def loop(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Callable[..., Any]]:
    """The model, and how it continues a prompt [B, T]."""
    from bam_merge import load_model

    model = load_model(folder, dtype).to(device)
    return model, model.generate


def vllm(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Callable[..., Any]]:
    """The engine, and how it continues a prompt [B, T]."""
    settings = {"KVCACHE_SPACE": "1", "OMP_THREADS_BIND": "nobind"}  # GiB; as many threads as torch would take
    os.environ.update({f"VLLM_CPU_{name}": value for name, value in settings.items()})
    os.environ.update(VLLM_HOST_IP="127.0.0.1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=folder, dtype=str(dtype).removeprefix("torch."), max_model_len=512, max_num_seqs=1, enforce_eager=True,
        trust_remote_code=True, skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
        distributed_executor_backend="uni",
    )  # fmt: skip

    def generate(ids_BT: torch.Tensor, count: int) -> torch.Tensor:
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in ids_BT.tolist()]
        done = [output.outputs[0].token_ids for output in engine.generate(prompts, how, use_tqdm=False)]
        return torch.cat((ids_BT, torch.tensor([list(ids) for ids in done])), 1)

    return engine, generate


def timed(call: Callable[[], Any], repeats: int, wait: Callable[[], None]) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted. `wait` returns when the device has done what it was asked."""
    call()
    wait()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def main(folder: str, kind: str, dtype: str, prompt: str, new: str, repeats: str, device: str = "cpu") -> None:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    model, generate = {"exported": exported, "loop": loop, "vllm": vllm}[kind](folder, getattr(torch, dtype), device)
    with open(os.path.join(folder, "config.json")) as stream:
        words = json.load(stream)["vocab_size"]
    ids_BT = torch.randint(words, (1, int(prompt)), generator=torch.Generator().manual_seed(0)).to("cpu" if kind == "vllm" else device)
    made = generate(ids_BT, int(new))
    if made.shape != (1, int(prompt) + int(new)):
        raise SystemExit(f"{folder}: {tuple(made.shape)} tokens came back, not {new} more than {prompt}")
    result: dict[str, Any] = {}
    if kind != "vllm":
        outputs = model(ids_BT)
        if not bool(getattr(outputs, "logits", outputs).isfinite().all()):
            raise SystemExit(f"{folder}: logits are NaN or infinite")
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        result["forward"] = timed(lambda: model(ids_BT), int(repeats), wait)
    result["prompt"] = timed(lambda: generate(ids_BT, 1), int(repeats), wait)
    result["generate"] = timed(lambda: generate(ids_BT, int(new)), int(repeats), wait)
    if kind == "exported":
        layers = model(ids_BT, use_cache=True).past_key_values.layers
        result["cache_bytes"] = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    if device.startswith("cuda"):
        result["device_bytes"] = torch.cuda.max_memory_allocated(device)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
