"""Run by the Python that has vLLM: IN is a list of [folder, prompts as ids, tokens, remote code], OUT gets a line of JSON for each.

The answer to each is its greedy tokens and their log-probabilities, and those of the prompts' tokens; or `failed` with the reason.
"""

import gc
import json
import os
import sys
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_HOST_IP="127.0.0.1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
)  # fmt: skip


def answers(folder: str, prompts: list[list[int]], tokens: int, remote_code: bool) -> list[dict[str, Any]]:
    """What vLLM says to each prompt."""
    from vllm import LLM, SamplingParams, TokensPrompt

    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 4, "trust_remote_code": remote_code,
        "disable_log_stats": True, "distributed_executor_backend": "uni", **json.loads(os.environ.get("VLLM_MORE", "{}")),
    }  # fmt: skip
    model = LLM(model=folder, **options)
    # Not by min_tokens, under which the token that ends a text has no probability.
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    found = []
    for prompt, done in zip(
        prompts, model.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], how, use_tqdm=False), strict=True
    ):
        said = list(done.outputs[0].token_ids)
        scores = [place[token].logprob for token, place in zip(said, done.outputs[0].logprobs, strict=True)]
        before = [place[token].logprob for token, place in zip(prompt[1:], done.prompt_logprobs[1:], strict=True)]
        found.append({"tokens": said, "scores": scores, "before": before})
    del model
    return found


def main() -> None:
    with open(sys.argv[1]) as stream:
        wanted = json.load(stream)
    for folder, prompts, tokens, remote_code in wanted:
        try:
            line: dict[str, Any] = {"folder": folder, "answers": answers(folder, prompts, tokens, remote_code)}
        except Exception as error:
            line = {"folder": folder, "failed": f"{type(error).__name__}: {error}"}
        with open(sys.argv[2], "a") as stream:
            stream.write(json.dumps(line) + "\n")
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main()
