"""How a merged model is used, as its card says: snippets that the tests run, and what engines do with it."""

from collections.abc import Iterator

from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.planning.plan import Plan, Served

TRANSFORMERS_FLOOR = "5.10"
"""The oldest transformers whose interfaces the exported model code uses (the extra `hf` in pyproject.toml)."""


FOLDER = "THIS_FOLDER"
"""What stands in snippets for the folder, or for its name on the hub."""


LOADING = """
## Use

{how}:

```python
{code}
```
"""


WITH_CODE = "With transformers {floor} or later (5.23 for tensor-parallel training); the model code is in this folder"


WITHOUT_CODE = "With transformers, where it is `{name}`"


REFERENCE = """
Without transformers, and without running code of this folder, by bam-merge's reference model:

```python
import bam_merge

model = bam_merge.load_model("THIS_FOLDER")  # model(input_ids [B, T]) -> logits [B, T, V]
```
"""


LORA = """
LoRA by PEFT, on {what}:

```python
from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig({targets}))
```
"""


ONNX = """
ONNX by torch (it needs the packages onnx and onnxscript){why}:

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}", {arguments}).eval()
ids = torch.tensor([[1, 2, 3, 4]])
torch.onnx.export(model, (ids,), "model.onnx", dynamo=True, input_names=["input_ids"], output_names=["logits"])
```
"""


VLLM = """
vLLM:

```console
vllm serve {folder}{flags}
```
"""


GGUF = """
GGUF, by llama.cpp's converter:

```console
python convert_hf_to_gguf.py {folder} --outfile model.gguf
```

`bam-merge export gguf {folder} model.gguf` runs it, and compares what it wrote with this folder, every value.
"""


SNIPPETS = {"vllm": VLLM, "gguf": GGUF}
"""How engines are given the folder, by a recipe's words for them."""


def use(plan: Plan, chat: bool) -> str:
    """The sections on loading, serving and adapting the model. `chat`: its tokenizer has a chat template."""
    bam = "auto_map" in plan.config
    how = WITH_CODE.format(floor=TRANSFORMERS_FLOOR) if bam else WITHOUT_CODE.format(name=plan.layout.class_name)
    code = "\n".join(_generating(plan, chat, bam))
    parts = [LOADING.format(how=how, code=code)]
    if bam:
        parts.append(REFERENCE)
    parts += ["\n## Serve\n", *_engines(plan), "\n## Adapt and export\n", _lora(plan)]
    parts.append(_onnx(plan, bam))
    return "".join(parts)


def _generating(plan: Plan, chat: bool, bam: bool) -> Iterator[str]:
    """The lines of the first snippet: what it can be given depends on the tokenizer."""
    trusting = ", trust_remote_code=True" if bam else ""
    model = f'model = AutoModelForCausalLM.from_pretrained("{FOLDER}"{trusting})'
    if VOCABULARIES.isdisjoint(plan.files):
        yield from ("import torch", "from transformers import AutoModelForCausalLM", "", model)
        yield "ids = torch.tensor([[1, 2, 3]])  # this folder has no tokenizer, for no source had one"
        yield "print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40))"
        return
    yield from ("from transformers import AutoModelForCausalLM, AutoTokenizer", "")
    yield from (f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}"{trusting})', model)
    if chat:
        yield 'messages = [{"role": "user", "content": "What is a mixture of experts?"}]'
        yield 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    else:
        yield 'inputs = tokenizer("A mixture of experts is", return_tensors="pt")'
    yield "output = model.generate(**inputs, max_new_tokens=40)"
    yield "print(tokenizer.decode(output[0], skip_special_tokens=True))"


def _engines(plan: Plan) -> Iterator[str]:
    """What engines beside transformers compute of the model, and how they are given it."""
    if plan.layout.kind == "dense":
        yield "\nIts tensors have the names and shapes of its sources', and its config.json is theirs: what runs them runs it.\n"
        return
    yield f"\nServes in: {'; '.join(_known(item) for item in plan.serves if item.serves)}.\n"
    if not plan.engines and "auto_map" not in plan.config:
        yield (
            f"\nvLLM and others know model_type `{plan.layout.model_types[0]}`; what they compute of this model was not tried. Compare "
            "a few replies with transformers'.\n"
        )
        return
    if not plan.engines:
        yield f"\nOf no engine but transformers is it known whether it computes layout `{plan.layout.name}`.\n"
        return
    flags = " --trust-remote-code" if "auto_map" in plan.config else ""
    for item in plan.serves:
        if item.reasons:
            yield f"\nNot in {item.name}, which does not compute this model as transformers does:\n\n"
            yield from (f"* {reason}\n" for reason in item.reasons)
        elif item.word in SNIPPETS:
            yield SNIPPETS[item.word].format(folder=FOLDER, flags=flags)


def _known(item: Served) -> str:
    """An engine, and how it is known that it serves the model."""
    return item.shown if item.word == "transformers" else f"{item.shown} ({item.how}: {item.about})"


def _lora(plan: Plan) -> str:
    if plan.layout.kind == "dense":
        return LORA.format(what="every linear layer", targets='target_modules="all-linear"')
    targets = 'target_modules="all-linear", target_parameters=["experts.gate_up_proj", "experts.down_proj"]'
    what = "attention and experts, not on the routers" if "auto_map" in plan.config else "attention and experts"
    return LORA.format(what=what, targets=targets)


def _onnx(plan: Plan, bam: bool) -> str:
    mixture = plan.layout.kind != "dense"
    options = {"trust_remote_code=True": bam, 'experts_implementation="batched_mm"': mixture, "use_cache=False": True}
    why = "; it has no grouped products of matrices, so experts are computed as a batch" if mixture else ""
    return ONNX.format(folder=FOLDER, arguments=", ".join(key for key, wanted in options.items() if wanted), why=why)
