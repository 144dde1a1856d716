"""What is best made of a hybrid's layers with linear attention: experts, their mean, or the seed's? And of A_log and dt_bias, in a mean?

A small Qwen3.5 is trained on bytes of all domains, branches of it on one each. Everything that can be made of them is measured by the
nats per byte of each domain's held-out text: as merged, and after as many steps of training on all domains. Needs the extra `hf`; takes
some minutes.

    python benchmarks/linear_attention.py [--steps 400] [--branch-steps 200] [--after 60] [--json FILE]
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import router_texts
import torch
from common import write_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from bam_merge import MergeOptions, load_recipe, merge

DOMAINS = ("docstrings", "cpp", "gnu")
SIZES: Mapping[str, Any] = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 24,
    "linear_value_head_dim": 24, "max_position_embeddings": 512,
}  # fmt: skip
TOKENS, BATCH = 128, 8
DECAYS = ("A_log", "dt_bias")

Model = Any
Recipe = dict[str, Any]


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def train(model: Model, texts: Sequence[Tensor], steps: int, rate: float, seed: int) -> None:
    """So many steps of AdamW on windows of all texts alike."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        windows = []
        for row in range(BATCH):
            text = texts[row % len(texts)]
            start = int(torch.randint(len(text) - TOKENS - 1, (1,), generator=generator))
            windows.append(text[start : start + TOKENS])
        ids_BT = torch.stack(windows)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def nats(model: Model, text: Tensor, windows: int = 48) -> float:
    """Mean loss per byte over windows of held-out text."""
    count = min(windows, (len(text) - 1) // TOKENS)
    ids_BT = text[: count * TOKENS].view(count, TOKENS)
    logits_BTV = torch.cat([model(input_ids=part).logits for part in ids_BT.split(16)])
    return float(torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))


def made(folder: Path, name: str, recipe: Recipe) -> Model:
    """The model that a recipe makes of the branches in `folder`."""
    whole = {"sources": {source: source for source in ("seed", *DOMAINS)}, **recipe, "output": {"path": f"out-{name}"}}
    path = merge(load_recipe(write_recipe(folder / f"{name}.yaml", whole)), options=MergeOptions(verify=False))
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()


def rule(**keys: Any) -> list[Recipe]:
    return [{"roles": ["linear.A_log", "linear.dt_bias"], **keys}]


def rates_averaged(model: Model, branches: Sequence[Model]) -> Model:
    """A mean whose A_log is the logarithm of the mean of the rates exp(A_log), in which the decay is linear; dt_bias as in the mean."""
    result = copy.deepcopy(model)
    for name, parameter in result.named_parameters():
        if name.endswith("A_log"):
            rates = torch.stack([dict(branch.named_parameters())[name].detach().exp() for branch in branches])
            parameter.data.copy_(rates.mean(0).log())
    return result


def drift(seed: Model, branch: Model) -> dict[str, float]:
    """How far a branch is from the seed, relative to the seed's norm, of the decays and of the matrices of linear attention."""
    found: dict[str, list[float]] = {}
    theirs = dict(branch.named_parameters())
    for name, parameter in seed.named_parameters():
        kind = name.rpartition(".")[2] if name.endswith(DECAYS) else "matrices" if "linear_attn.in_proj" in name else None
        if kind:
            found.setdefault(kind, []).append(float(((theirs[name] - parameter).norm() / parameter.norm()).detach()))
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def candidates(folder: Path, branches: Mapping[str, Model]) -> dict[str, Callable[[], Model]]:
    """Everything that is compared, by what the table calls it."""
    texts: Recipe = {"router": {"init": "normal", "std": 0.02}, "ffn": {"top_k": 2, "gate": "topk_then_softmax"}}
    found: dict[str, Callable[[], Model]] = {name: (lambda name=name: copy.deepcopy(branches[name])) for name in branches}
    mean: Recipe = {"method": "merge"}
    averaged = made(folder, "mean-mean", {**mean, "rules": rule(make="mean")})
    found["dense mean, decays of the seed"] = lambda: made(folder, "mean-seed", mean)
    found["dense mean, decays averaged"] = lambda: copy.deepcopy(averaged)
    found["dense mean, rates averaged"] = lambda: rates_averaged(averaged, list(branches.values()))
    for linear in ("expert", "mean", "seed"):
        recipe = {"method": "bam", **texts, "attention": {"linear": linear}}
        found[f"BAM, linear: {linear}"] = lambda linear=linear, recipe=recipe: made(folder, f"bam-{linear}", recipe)
    decays = {"method": "bam", **texts, "attention": {"linear": "mean"}, "rules": rule(make="mean")}
    found["BAM, linear: mean, decays averaged"] = lambda: made(folder, "bam-mean-mean", decays)
    found["BTX"] = lambda: made(folder, "btx", {"method": "btx", **texts})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("steps", 400), ("branch-steps", 200), ("after", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    texts = {name: router_texts.made_text(name) for name in DOMAINS}
    training = {name: as_bytes(text.training) for name, text in texts.items()}
    heldout = {name: as_bytes(text.heldout) for name, text in texts.items()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        branches = {"seed": Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES))}
        train(branches["seed"], list(training.values()), options.steps, 2e-3, 1)
        for name in DOMAINS:
            branches[name] = copy.deepcopy(branches["seed"])
            train(branches[name], [training[name]], options.branch_steps, 1e-3, 2)
        for name, model in branches.items():
            model.save_pretrained(folder / name)
            if name != "seed":
                print(f"drift of {name}: " + ", ".join(f"{kind} {far:.4f}" for kind, far in drift(branches["seed"], model).items()))
        rows: dict[str, list[float]] = {}
        print(f"\n| nats per byte | {' | '.join(DOMAINS)} | mean | after {options.after} steps |\n|---|{'---:|' * (len(DOMAINS) + 2)}")
        for name, make in candidates(folder, branches).items():
            model = make()
            found = [nats(model, heldout[domain]) for domain in DOMAINS]
            train(model, list(training.values()), options.after, 1e-3, 3)
            after = [nats(model, heldout[domain]) for domain in DOMAINS]
            rows[name] = [*found, sum(found) / len(found), sum(after) / len(after)]
            print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in rows[name]) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
