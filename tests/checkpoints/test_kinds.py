"""What people have in place of a model's folder: each kind is named, with what to write instead, by every command that is given it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from damage import said, shard

from bam_merge.checkpoints.kinds import absent, told
from bam_merge.sources.dense import read_dense

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def files(*names: str, **contents: str) -> Callable[[Path], None]:
    """Makes a folder of empty files, and of those with contents: a__json is a.json."""

    def make(law: Path) -> None:
        shutil.rmtree(law)
        for name, text in {**dict.fromkeys(names, ""), **{key.replace("__", "."): text for key, text in contents.items()}}.items():
            (law / name).parent.mkdir(parents=True, exist_ok=True)
            (law / name).write_text(text)

    return make


def inside(place: str, *names: str) -> Callable[[Path], None]:
    """Moves the model of the folder into another one below it, beside empty files."""

    def make(law: Path) -> None:
        model = law.rename(law.with_name("moved"))
        (law / place).parent.mkdir(parents=True)
        model.rename(law / place)
        for name in names:
            (law / name).parent.mkdir(parents=True, exist_ok=True)
            (law / name).touch()

    return make


def adapter(law: Path, kind: str = "LORA", base: str | None = "org/base") -> None:
    files("adapter_model.safetensors")(law)
    (law / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": base}))


def run_of(law: Path, *steps: int, best: str | None = None) -> None:
    inside(f"checkpoint-{steps[0]}", "training_args.bin", "config.json")(law)
    for step in steps[1:]:
        shutil.copytree(law / f"checkpoint-{steps[0]}", law / f"checkpoint-{step}")
    if best:
        (law / f"checkpoint-{max(steps)}" / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": f"runs/x/{best}"}))


def run_of_adapters(law: Path) -> None:
    adapter(law)
    inside("checkpoint-20")(law)


def pointers(law: Path) -> None:
    shard(law)
    for path in law.glob("*.safetensors"):
        path.write_bytes(POINTER)


def no_shards(law: Path) -> None:
    shard(law)
    for path in law.glob("*.safetensors"):
        path.unlink()


def original(law: Path) -> None:
    (law / "original").mkdir()
    (law / "model.safetensors").rename(law / "original" / "consolidated.00.pth")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a LoRA adapter": (adapter, "HOME/law: this is an adapter (LoRA) of org/base, no model by itself. Write base and adapter: {base: org/base, adapter: HOME/law}."),
    "an adapter of unknown base": (lambda law: adapter(law, base=None), "HOME/law: this is an adapter (LoRA), no model by itself. Write base and adapter: {base: ..., adapter: HOME/law}."),
    "an adapter of another type": (lambda law: adapter(law, "IA3"), "HOME/law: this is an adapter (IA3) of org/base, no model by itself. Merge it into its base with PEFT (merge_and_unload, save_pretrained), and write that folder."),
    "an adapter with a broken config": (files("adapter_model.bin", adapter_config__json="{"), "HOME/law: this is an adapter, no model by itself. Write base and adapter: {base: ..., adapter: HOME/law}."),
    "several adapters": (files("a/adapter_config.json", "b/adapter_config.json"), "HOME/law: this is a folder of 2 adapters (a, b). Write one and its base: {base: ..., adapter: HOME/law/a}."),
    "a run": (lambda law: run_of(law, 500, 1000, 90), "HOME/law: this is the folder of a training run. Write its latest checkpoint, HOME/law/checkpoint-1000, 2 earlier or other checkpoints beside it."),
    "a run with a best checkpoint": (lambda law: run_of(law, 500, 1000, best="checkpoint-500"), "HOME/law: this is the folder of a training run. Write its latest checkpoint, HOME/law/checkpoint-1000, 1 earlier or other checkpoint beside it (the trainer found checkpoint-500 the best)."),
    "a run of adapters": (run_of_adapters, "HOME/law: this is the folder of a training run. Write its latest checkpoint, HOME/law/checkpoint-20; but that is an adapter (LoRA) of org/base, no model by itself. Write base and adapter: {base: org/base, adapter: HOME/law/checkpoint-20}."),
    "GGUF": (files("m-Q4_K_M.gguf", "config.json"), "HOME/law: this is a folder of GGUF files (m-Q4_K_M.gguf), the form of llama.cpp, mostly quantised. Write the Hugging Face folder that it was made from."),
    "diffusers": (files("unet/diffusion_pytorch_model.safetensors", model_index__json='{"_class_name": "FluxPipeline"}'), "HOME/law: this is a diffusers pipeline (FluxPipeline), which makes images, sound or video, and no language model. Nothing of it can be merged here."),
    "ONNX": (files("model.onnx", "model.onnx_data", "config.json"), "HOME/law: this is a model exported to ONNX (model.onnx, model.onnx_data). Write the Hugging Face folder that it was exported from."),
    "Meta's own form": (files("consolidated.00.pth", "params.json"), "HOME/law: this is weights in Meta's own form (consolidated.00.pth). Write the Hugging Face folder of the same model, or convert it with transformers (models/llama/convert_llama_weights_to_hf.py)."),
    "Meta's own form in its folder": (original, "HOME/law: this is weights in Meta's own form (consolidated.00.pth). Write the Hugging Face folder of the same model, or convert it with transformers (models/llama/convert_llama_weights_to_hf.py)."),
    "Mistral's own form": (files("consolidated.safetensors", "params.json", "tekken.json"), "HOME/law: this is weights in Mistral's own form (consolidated.safetensors). Write the Hugging Face folder of the same model, or convert it with transformers (models/mistral/convert_mistral_weights_to_hf.py)."),
    "the folder above a model": (inside("final"), "HOME/law: this is the folder above a model's. Did you mean HOME/law/final?"),
    "the folder above several": (lambda law: (inside("a")(law), shutil.copytree(law / "a", law / "b")), "HOME/law: this is a folder of 2 models, and no model itself. Did you mean one of HOME/law/a, HOME/law/b?"),
    "DCP": (files(".metadata", "__0_0.distcp", "__1_0.distcp"), "HOME/law: this is a sharded checkpoint of torch.distributed.checkpoint. Make one file of it, in that trainer's way: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin; then bam-merge convert."),
    "FSDP": (files("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata"), "HOME/law: this is the state of an FSDP run, its model in shards (pytorch_model_fsdp_0). Join them: accelerate merge-weights HOME/law/pytorch_model_fsdp_0 NEW_FOLDER."),
    "DeepSpeed": (files("global_step500/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py", "config.json"), "HOME/law: this is a DeepSpeed checkpoint. Make one file of it, in that trainer's way: python zero_to_fp32.py . NEW_FOLDER --safe_serialization; then bam-merge convert."),
    "Megatron": (files("latest_checkpointed_iteration.txt", "iter_0000500/mp_rank_00/model_optim_rng.pt"), "HOME/law: this is a Megatron checkpoint. Export it with the converter of the trainer that wrote it (Megatron Bridge, Megatron-LM's tools/checkpoint), and write the Hugging Face folder that it gives."),
    "NeMo": (files("weights/common.pt", "context/model.yaml"), "HOME/law: this is a NeMo checkpoint. Export it to a Hugging Face folder (nemo.collections.llm.export_ckpt), and write that folder."),
    "TensorFlow": (files("tf_model.h5", "config.json"), "HOME/law: this is TensorFlow's weights (tf_model.h5). Load them with transformers 4 (from_tf=True), save_pretrained, and write that folder."),
    "a data set": (files("train-00000-of-00001.parquet", "README.md"), "HOME/law: this is a data set (train-00000-of-00001.parquet), not a model. Write a model's folder."),
    "archives": (files("model.tar.gz"), "HOME/law: this is a folder of archives (model.tar.gz). Unpack the model, and write its folder."),
    "a state without weights": (files("optimizer.pt", "trainer_state.json", "config.json"), "HOME/law: this is the state of a training run (optimizer.pt, trainer_state.json) without weights. Write the folder that has them."),
    "a tokenizer": (files("tokenizer.json", "tokenizer_config.json"), "HOME/law: this is a tokenizer's folder, without a model. Write the model's."),
    "a download cut off": (files("config.json", "tokenizer.json", ".cache/huggingface/download/x.incomplete"), "HOME/law: this is a download that was cut off (x.incomplete). Run it again: it goes on where it was."),
    "pointers": (pointers, "HOME/law: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors: 2 of 2 files are git-lfs pointers, not the weights themselves: run `git lfs pull` there."),
    "an index without shards": (no_shards, "HOME/law: model.safetensors.index.json is there, but none of the 2 files that it names (model-00001-of-00002.safetensors, model-00002-of-00002.safetensors): the weights were not downloaded. Download them, into this folder."),
    "pickles beside other forms": (lambda law: ((law / "model.safetensors").rename(law / "pytorch_model.bin"), (law / "tf_model.h5").touch(), (law / "training_args.bin").touch()), "HOME/law: only pytorch_model.bin present. Pickled weights are never loaded, since loading them runs code. Convert them once: bam-merge convert HOME/law NEW_FOLDER."),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_named_with_what_to_write(name: str, llamas: Path, run: Any) -> None:
    make, message = KINDS[name]
    recipe, law = write_recipe(llamas), llamas / "law"
    make(law)
    for command in (("plan", recipe), (recipe,), ("inspect", law), ("diff", llamas / "seed", law), ("diff", law, llamas / "seed")):
        assert said(run, llamas, *command) == [f"sources.law: {message}" if recipe in command else message], command
    verified = said(run, llamas, "verify", law)
    known = message.removeprefix("HOME/law: this is ").removesuffix(".")
    assert len(verified) == 1 and "no bam_merge.json" in verified[0]
    assert known in verified[0] or not message.startswith("HOME/law: this is ")


HUB: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a cached model": (inside("snapshots/0123abcd", "refs/main", "blobs/x"), "models--org--m", "HOME/models--org--m: this is the hub's cache of org/m; the model itself is in its snapshots. Write HOME/models--org--m/snapshots/0123abcd."),
    "its snapshots": (inside("models--org--m--x/snapshots/0123abcd"), "cache/models--org--m--x/snapshots", "HOME/cache/models--org--m--x/snapshots: this is the hub's cache of org/m--x; the model itself is in its snapshots. Write HOME/cache/models--org--m--x/snapshots/0123abcd."),
    "a cached model without a snapshot": (files("blobs/x.incomplete"), "models--org--m", "HOME/models--org--m: this is the hub's cache of org/m, without a snapshot: nothing of it was downloaded. Download it."),
    "the cache": (inside("models--org--m/snapshots/0123abcd", "models--a--b/refs/main"), "hub", "HOME/hub: this is a cache of the hub, with 2 models. Write the snapshot of one, as in HOME/hub/models--org--m/snapshots/0123abcd."),
    "the folder of the cache": (inside("hub/models--org--m/snapshots/0123abcd"), "huggingface", "HOME/huggingface: this is a cache of the hub, with 1 model. Write the snapshot of one, as in HOME/huggingface/hub/models--org--m/snapshots/0123abcd."),
    "a cached data set": (inside("snapshots/0123abcd"), "datasets--org--d", "HOME/datasets--org--d: this is the hub's cache of the data set org/d, not of a model. Write a model's folder."),
    "a staging folder": (inside("output", "journal"), ".merged.bam-merge", "HOME/.merged.bam-merge: this is the staging folder of HOME/merged, where a merge works until it is finished. Finish it, by running its recipe again with --resume, and write HOME/merged."),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_folder_is_known_by_its_name(name: str, llamas: Path, run: Any) -> None:
    make, place, message = HUB[name]
    make(llamas / "law")
    (llamas / "law").rename(llamas / place.partition("/")[0])
    recipe = llamas / "recipe.yaml"
    recipe.write_text(f"method: bam\nsources: {{seed: seed, law: {place}}}\noutput: {{path: out}}\n")
    for command in (("plan", recipe), ("inspect", llamas / place), ("diff", llamas / "seed", llamas / place)):
        assert said(run, llamas, *command) == [f"sources.law: {message}" if recipe in command else message], command


def test_of_several_snapshots_main_counts(tmp_path: Path) -> None:
    model = tmp_path / "models--org--m"
    for commit in ("aaaa", "bbbb"):
        (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("aaaa")
    assert str(told(model)).endswith(f"snapshots; 1 older or other snapshot beside it. Write {model}/snapshots/aaaa")


def test_a_model_in_staging_is_no_source(llamas: Path, run: Any) -> None:
    """It would be gone, or another, a moment later; to look at it is allowed."""
    inside("output")(llamas / "law")
    (llamas / "law").rename(llamas / ".merged.bam-merge")
    recipe = llamas / "recipe.yaml"
    recipe.write_text("method: bam\nsources: {seed: seed, law: .merged.bam-merge/output}\noutput: {path: out}\n")
    assert said(run, llamas, "plan", recipe) == [
        "sources.law: HOME/.merged.bam-merge/output: this is the staging folder of HOME/merged, where a merge works until it is finished. "
        "Finish it, by running its recipe again with --resume, and write HOME/merged."
    ]
    assert run("inspect", llamas / ".merged.bam-merge" / "output").status == 0


FILES = {
    "law/model.safetensors": "a file of a model's folder, and the folder is what is merged. Write HOME/law.",
    "law/config.json": "a file of a model's folder, and the folder is what is merged. Write HOME/law.",
    "law/adapter_model.safetensors": "a file of an adapter's folder. Write base and adapter: {base: ..., adapter: HOME/law}.",
    "law/m.gguf": "a GGUF file, the form of llama.cpp, mostly quantised. Write the Hugging Face folder that it was made from.",
    "law/pytorch_model.bin": "a file of pickled weights, which are never loaded, since loading them runs code. Convert its folder once: bam-merge convert HOME/law NEW_FOLDER.",
    "law/model.onnx": "a model exported to ONNX. Write the Hugging Face folder that it was exported from.",
    "law/m.nemo": "a NeMo checkpoint. Export it to a Hugging Face folder (nemo.collections.llm.export_ckpt), and write that folder.",
    "law/m.tar.gz": "an archive. Unpack it, and write the folder with config.json.",
    "law/merge.yaml": "a YAML file. To merge by it: bam-merge HOME/law/merge.yaml; what it made is the folder of its output.path.",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_with_what_to_write(name: str, llamas: Path, run: Any) -> None:
    (llamas / name).touch()
    recipe = llamas / "recipe.yaml"
    recipe.write_text(f"method: bam\nsources: {{seed: seed, law: {name}}}\noutput: {{path: out}}\n")
    assert said(run, llamas, "plan", recipe) == [f"sources.law: HOME/{name}: not a folder. It is {FILES[name]}"]
    looked = run("inspect", llamas / name)
    if name.endswith(".safetensors"):
        assert looked.status == (0 if Path(name).name == "model.safetensors" else 2)  # a file alone can be looked at
    else:
        assert looked.err.replace(str(llamas), "HOME") == f"error: HOME/{name}: this is {FILES[name]}\n"


def test_a_folder_that_is_not_there(llamas: Path, run: Any) -> None:
    def refused(source: str) -> str:
        recipe = llamas / "recipe.yaml"
        recipe.write_text(f"method: bam\nsources: {{seed: seed, law: {source}}}\noutput: {{path: out}}\n")
        (line,) = said(run, llamas, "plan", recipe)
        return line

    assert "no such folder. If org/model-1b is a model of the hub, download it (hf download org/model-1b" in refused("org/model-1b@main")
    assert refused("cod") == "sources.law: HOME/cod: no such folder. Did you mean 'code'?"
    assert refused("quite-another") == "sources.law: HOME/quite-another: no such folder."
    assert absent("seed/x", llamas / "seed" / "x") == ""  # its parent is here, so it is no hub's name


def test_what_can_be_opened_is_of_no_other_kind(llamas: Path) -> None:
    """A model's folder stays one, whatever else is in it."""
    law = llamas / "law"
    (law / "checkpoint-5").mkdir()
    for name in ("m.gguf", "model.onnx", "consolidated.safetensors", "optimizer.pt", "x.incomplete", "model_index.json"):
        (law / name).touch()
    assert told(law) is None
    assert read_dense("law", law).family.name == "llama"


def test_what_cannot_be_listed_is_of_no_kind(tmp_path: Path) -> None:
    assert told(tmp_path / "nothing") is None
    write_sources(tmp_path, CONFIGS["llama"], ("law",))
    (tmp_path / "law" / "config.json").unlink()
    assert told(tmp_path / "law") is None
