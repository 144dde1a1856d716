"""What people have that is no model's folder: what it is, by its names, and what to write instead. One function or row each.

Asked only where a folder cannot be opened as a model's: nothing here refuses what can be. Names are listed, and small JSON files
read; no weights are.
"""

import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from bam_merge.checkpoints.header import open_regular
from bam_merge.checkpoints.look import CONFIG, Look, shown
from bam_merge.checkpoints.positional import beginning
from bam_merge.errors import CheckpointError
from bam_merge.text import count, nearest, printable, some

POINTER = b"version https://git-lfs"


STAGING = re.compile(r"\.(.+)\.bam-merge")


HUB_FOLDER = re.compile(r"(model|dataset|space)s--(.+)")


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")


SOURCE_OF = "Write the Hugging Face folder that {} from"
MADE, EXPORTED = SOURCE_OF.format("it was made"), SOURCE_OF.format("it was exported")


# ---- folders ---------------------------------------------------------------------------------------------------------------


def _staging(look: Look) -> str | None:
    return staged(look.path)


def staged(path: Path) -> str | None:
    """What is said of a folder in which a merge works until it is finished; None for any other."""
    for folder in (path, path.parent):
        name = STAGING.fullmatch(folder.name)
        if name and (folder is path or path.name in ("output", "replaced")):
            target = folder.with_name(name[1])
            return (
                f"the staging folder of {shown(target)}, where a merge works until it is finished. Finish it, by running its recipe again "
                f"with --resume, and write {shown(target)}"
            )
    return None


def _hub_cache(look: Look) -> str | None:
    """A folder of the hub's cache above a snapshot: of one model, of its snapshots, or of all models."""
    name = HUB_FOLDER.fullmatch(look.path.name)
    if look.path.name == "snapshots" and (name := HUB_FOLDER.fullmatch(look.path.parent.name)):
        look = Look(look.path.parent)
    if name is None:
        look = look.inner("hub") if "hub" in look.entries else look
        models = look.folders("models--*")
        if not models:
            return None
        some_one = next((written for name in models if (written := _snapshot(look.inner(name))[0])), "...")
        return f"a cache of the hub, with {count(len(models), 'model')}. Write the snapshot of one, as in {some_one}"
    what, repository = name[1], name[2].replace("--", "/", 1)
    if what != "model":
        other = "data set" if what == "dataset" else "space"
        return f"the hub's cache of the {other} {printable(repository)}, not of a model. Write a model's folder"
    written, others = _snapshot(look)
    if not written:
        return f"the hub's cache of {printable(repository)}, without a snapshot: nothing of it was downloaded. Download it"
    more = f"; {count(others, 'older or other snapshot')} beside it" if others else ""
    return f"the hub's cache of {printable(repository)}; the model itself is in its snapshots{more}. Write {written}"


def _snapshot(look: Look) -> tuple[str, int]:
    """The snapshot of a cached model that its branch main is at, else the newest one, and how many others there are; "" for none."""
    snapshots = look.inner("snapshots")
    names = snapshots.folders("*")
    if not names:
        return "", 0
    try:
        with open(look.path / "refs" / "main", "rb") as stream:
            main = stream.read(100).decode(errors="replace").strip()
    except OSError:
        main = ""
    newest = max(names, key=lambda name: (_mtime(snapshots.path / name), name))
    return shown(snapshots.path / (main if main in names else newest)), len(names) - 1


def _mtime(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _adapter(look: Look) -> str | None:
    """An adapter by itself, or a folder of several."""
    if look.files("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        return _one_adapter(look)
    several = [name for name in look.folders("*") if "adapter_config.json" in look.inner(name).entries]
    if not several or _checkpoints(look):
        return None
    one = f"{{base: ..., adapter: {shown(look.path / several[0])}}}"
    return f"a folder of {count(len(several), 'adapter')} ({some(several)}). Write one and its base: {one}"


def _one_adapter(look: Look) -> str:
    config = look.json("adapter_config.json")
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    kind = printable(kind, 40) if isinstance(kind, str) else ""
    named = printable(base) if isinstance(base, str) and base else ""
    what = f"an adapter ({'LoRA' if kind == 'LORA' else kind})" if kind else "an adapter"
    on = f" of {named}" if named else ""
    way = f"{{base: {named or '...'}, adapter: {shown(look.path)}}}"
    if kind and kind.upper() != "LORA":
        merge = "Merge it into its base with PEFT (merge_and_unload, save_pretrained)"
        return f"{what}{on}, no model by itself. {merge}, and write that folder"
    return f"{what}{on}, no model by itself. Write base and adapter: {way}"


def _checkpoints(look: Look) -> list[str]:
    numbered = [name for name in look.folders("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,12}", name)]
    return sorted(numbered, key=lambda name: int(name.partition("-")[2]))


def _run(look: Look) -> str | None:
    """A folder of a training run: the model is in one of its checkpoints."""
    names = _checkpoints(look)
    if not names:
        return None
    best = look.inner(names[-1]).json("trainer_state.json").get("best_model_checkpoint")
    best = os.path.basename(best) if isinstance(best, str) else ""
    whole = [name for name in names if (inner := look.inner(name)).is_model or inner.is_pickled_model]
    latest = (whole or names)[-1]
    others = f", {count(len(names) - 1, 'earlier or other checkpoint')} beside it" if len(names) > 1 else ""
    judged = f" (the trainer found {printable(best)} the best)" if best in names and best != latest else ""
    text = f"the folder of a training run. Write its latest checkpoint, {shown(look.path / latest)}{others}{judged}"
    inside = None if whole else told(look.path / latest)
    return f"{text}; but that is {inside}" if inside else text


def _sharded(look: Look) -> str | None:
    """What trainers save of a model that is spread over processes."""
    if ".metadata" in look.entries and look.files("*.distcp"):
        return "a sharded checkpoint of torch.distributed.checkpoint. " + _AFTER_ONE_FILE.format(
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin"
        )
    if inner := look.folders("pytorch_model_fsdp_*"):
        join = f"accelerate merge-weights {shown(look.path / inner[0])} NEW_FOLDER"
        return f"the state of an FSDP run, its model in shards ({printable(inner[0])}). Join them: {join}"
    if look.files("zero_to_fp32.py") or look.folders("global_step*") or look.files("mp_rank_*_model_states.pt", "zero_pp_rank_*"):
        return "a DeepSpeed checkpoint. " + _AFTER_ONE_FILE.format("python zero_to_fp32.py . NEW_FOLDER --safe_serialization")
    if look.files("latest_checkpointed_iteration.txt") or look.folders("iter_[0-9]*", "mp_rank_[0-9]*"):
        return (
            "a Megatron checkpoint. Export it with the converter of the trainer that wrote it (Megatron Bridge, Megatron-LM's "
            "tools/checkpoint), and write the Hugging Face folder that it gives"
        )
    if look.files("*.nemo") or {"weights", "context"} <= set(look.folders("*")):
        return "a NeMo checkpoint. Export it to a Hugging Face folder (nemo.collections.llm.export_ckpt), and write that folder"
    if look.folders("ocdbt.process_*") or look.files("_CHECKPOINT_METADATA", "manifest.ocdbt"):
        return "an Orbax checkpoint of JAX. Export it to a Hugging Face folder, and write that folder"
    return None


_AFTER_ONE_FILE = "Make one file of it, in that trainer's way: {}; then bam-merge convert"


def _original(look: Look) -> str | None:
    """Weights in the form in which Meta and Mistral publish theirs beside the Hugging Face one."""
    look = look.inner("original") if "original" in look.entries else look
    files = look.files("consolidated.*.pth", "consolidated*.safetensors")
    if not files:
        return None
    form = "Mistral's" if files[0].endswith(".safetensors") else "Meta's"
    above = Look(look.path.parent)
    text = f"weights in {form} own form ({some(files)})"
    if above.is_model or above.is_pickled_model:
        return f"{text}; the Hugging Face form is in the folder above. Write {shown(above.path)}"
    return f"{text}. Write the Hugging Face folder of the same model, or convert it with transformers ({_CONVERTERS[form]})"


_CONVERTERS = {"Meta's": "models/llama/convert_llama_weights_to_hf.py", "Mistral's": "models/mistral/convert_mistral_weights_to_hf.py"}


def _diffusers(look: Look) -> str | None:
    if "model_index.json" not in look.entries:
        return None
    name = look.json("model_index.json").get("_class_name")
    called = f" ({printable(name, 60)})" if isinstance(name, str) else ""
    return f"a diffusers pipeline{called}, which makes images, sound or video, and no language model. Nothing of it can be merged here"


def _parent(look: Look) -> str | None:
    """A folder above those of models."""
    inner = [name for name in look.folders("*") if not name.startswith(".")][:1000]
    models = [name for name in inner if (found := look.inner(name)).is_model or found.is_pickled_model]
    if not models or CONFIG in look.entries:
        return None
    if len(models) == 1:
        return f"the folder above a model's. Did you mean {shown(look.path / models[0])}?"
    listed = some([str(look.path / name) for name in models], 5)
    return f"a folder of {count(len(models), 'model')}, and no model itself. Did you mean one of {listed}?"


OTHER_FILES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("*.gguf",), f"a folder of GGUF files ({{found}}), the form of llama.cpp, mostly quantised. {MADE}"),
    (("*.onnx", "*.onnx_data"), f"a model exported to ONNX ({{found}}). {EXPORTED}"),
    (("openvino_model.*",), f"a model exported to OpenVINO ({{found}}). {EXPORTED}"),
    (("*.engine", "rank[0-9]*.safetensors"), f"an engine of TensorRT-LLM ({{found}}). {MADE}"),
    (("tf_model.h5", "*.ckpt.index"), "TensorFlow's weights ({found}). " + (OLD := "Load them with transformers 4 ({0}=True), "
     "save_pretrained, and write that folder").format("from_tf")),
    (("flax_model*.msgpack",), "Flax's weights ({found}). " + OLD.format("from_flax")),
    (("*.llamafile",), f"a llamafile ({{found}}), a program with GGUF weights. {MADE}"),
    (("pytorch_lora_weights.safetensors",), "a diffusers adapter ({found}), of no language model. Nothing of it can be merged here"),
    (("*.parquet", "*.arrow", "dataset_info.json"), "a data set ({found}), not a model. Write a model's folder"),
    (("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"), "a folder of archives ({found}). Unpack the model, and write its folder"),
    (("optimizer.*", "trainer_state.json"), "the state of a training run ({found}) without weights. Write the folder that has them"),
)  # fmt: skip
"""(names of files, what a folder is that has such a file and no model)."""


def _other_files(look: Look) -> str | None:
    for patterns, text in OTHER_FILES:
        if found := look.files(*patterns):
            return text.format(found=some(found))
    return None


def _unfinished(look: Look) -> str | None:
    """What a download leaves that brought nothing, or not the weights."""
    download = Look(look.path / ".cache" / "huggingface" / "download")
    partial = [*look.files("*.incomplete", "*.part", "*.crdownload"), *download.files("*.incomplete")]
    if partial:
        return f"a download that was cut off ({some(partial)}). Run it again: it goes on where it was"
    safetensors = look.files("*.safetensors")
    if not safetensors and look.files("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"):
        return None if CONFIG in look.entries else "a tokenizer's folder, without a model. Write the model's"
    return None


FOLDERS: tuple[Callable[[Look], str | None], ...] = (
    _staging, _hub_cache, _adapter, _run, _sharded, _original, _diffusers, _parent, _other_files, _unfinished,
)  # fmt: skip
"""Every kind of folder, the narrower ones first. Each gives what is said of a folder of its kind, without a full stop."""


# ---- files -----------------------------------------------------------------------------------------------------------------

OF_A_FOLDER = "a file of a model's folder, and the folder is what is merged"
FILES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("adapter_*.safetensors", "adapter_*.bin", "adapter_config.json"), "a file of an adapter's folder. Write base and adapter: "
     "{{base: ..., adapter: {folder}}}"),
    (("*.safetensors", "*.safetensors.index.json", CONFIG, "tokenizer*", "generation_config.json"), f"{OF_A_FOLDER}. Write {{folder}}"),
    (("*.gguf",), f"a GGUF file, the form of llama.cpp, mostly quantised. {MADE}"),
    (("*.bin", "*.pt", "*.pth", "*.ckpt"), "a file of pickled weights, which are never loaded, since loading them runs code. Convert "
     "its folder once: bam-merge convert {folder} NEW_FOLDER"),
    (("*.onnx",), f"a model exported to ONNX. {EXPORTED}"),
    (("*.nemo",), "a NeMo checkpoint. Export it to a Hugging Face folder (nemo.collections.llm.export_ckpt), and write that folder"),
    (("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"), "an archive. Unpack it, and write the folder with config.json"),
    (("*.h5", "*.msgpack"), "weights of TensorFlow or Flax. Load them with transformers 4, save_pretrained, and write that folder"),
    (("*.yaml", "*.yml"), "a YAML file. To merge by it: bam-merge {path}; what it made is the folder of its output.path"),
)  # fmt: skip
"""(names, what is said of such a file where a model's folder was to stand)."""


def told_of_file(path: Path) -> str | None:
    """What the file at `path` is in place of a model's folder, and what to write; None where its name says nothing."""
    for patterns, text in FILES:
        if any(fnmatchcase(path.name, pattern) for pattern in patterns):
            folder = path.parent.parent if path.parent.name == "onnx" else path.parent
            return text.format(folder=shown(folder), path=shown(path))
    return None


# ---- what one can ask ------------------------------------------------------------------------------------------------------


def told(path: Path) -> str | None:
    """What the folder at `path` is, that is no model's, and what to write instead; None where it is nothing known."""
    look = Look(path)
    if look.is_model or look.is_pickled_model:
        return None
    return next((text for kind in FOLDERS if (text := kind(look))), None)


def other_kind(path: Path) -> str | None:
    """The message for a folder at `path` that cannot be opened as a model's; None where it is nothing known."""
    text = told(path)
    return None if text is None else f"{shown(path)}: this is {text}{'' if text.endswith('?') else '.'}"


def absent(written: str, path: Path) -> str:
    """What more is said of a folder that is not there: that `written` may be meant for the hub, or another folder's name."""
    if HUB_NAME.fullmatch(written) and not path.parent.exists():
        name = printable(written.partition("@")[0])
        return f" If {name} is a model of the hub, download it (hf download {name} --local-dir FOLDER), and write its folder."
    close = nearest(path.name, Look(path.parent).folders("*"))
    return close.replace("; did", " Did")


def pointers(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are pointers of git-lfs."""
    found = []
    for name in names:
        try:
            descriptor = open_regular(str(folder / name))
        except CheckpointError:
            continue
        try:
            if beginning(descriptor, len(POINTER)) == POINTER:
                found.append(name)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return found
