"""`bam-merge convert`: pickled weights to safetensors, the same tensors, published as a merge is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from damage import tree
from safetensors.torch import load_file

from bam_merge.checkpoints.folder import INDEX, open_checkpoint
from bam_merge.converting.convert import PICKLED_INDEX, convert
from bam_merge.converting.reader import Unfit, find

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def pickle_folder(
    folder: Path, config: str = "llama", name: str = "pytorch_model.bin", wrap: Callable[[Any], Any] = lambda t: t
) -> dict[str, torch.Tensor]:
    """Turn a small model's folder into one of pickled weights; its tensors."""
    write_sources(folder.parent, CONFIGS[config], (folder.name,))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(wrap(tensors), folder / name)
    return tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_a_converted_model_is_a_source(tmp_path: Path, run: Any) -> None:
    """What a merge says of a .bin leads to a folder that it takes."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "code"))
    tensors = pickle_folder(tmp_path / "law")
    (tmp_path / "law" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "law" / "optimizer.pt").touch()
    recipe = write_recipe(tmp_path)
    refused = run("plan", recipe).err.replace(str(tmp_path), "HOME")
    assert "bam-merge convert HOME/law NEW_FOLDER" in refused
    before = tree(tmp_path / "law")
    result: Result = run("convert", tmp_path / "law", tmp_path / "new")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{tmp_path}/new: {len(tensors)} tensors, 74.4 kB in 1 file\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    same(stored(tmp_path / "new"), tensors)
    assert (tmp_path / "new" / "config.json").read_bytes() == (tmp_path / "law" / "config.json").read_bytes()
    assert tree(tmp_path / "law") == before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "law").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "law")
    (tmp_path / "law" / "tokenizer_config.json").unlink()
    assert run(recipe).status == 0


def test_transformers_loads_the_same_of_both(tmp_path: Path) -> None:
    """The pickled folder and the converted one are one model, with a tied head, odd strides and a view of another tensor."""
    transformers = pytest.importorskip("transformers")
    tensors = pickle_folder(tmp_path / "law", "llama_tied")
    tensors[HEAD] = tensors[EMBED]
    whole = torch.randn(200, 32)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = whole[7 : 7 + tensors[name].shape[0]]
    turned = "model.layers.0.self_attn.q_proj.weight"
    tensors[turned] = torch.randn(32, 32).t()
    torch.save(tensors, tmp_path / "law" / "pytorch_model.bin")
    result = convert(tmp_path / "law", tmp_path / "new")
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("law", "new"))
    same(b.state_dict(), a.state_dict())
    assert torch.equal(b.state_dict()[name], whole[7 : 7 + tensors[name].shape[0]])
    assert result.notes == (f"{HEAD} equals the embeddings, which config.json ties it to: left out",)
    a.save_pretrained(tmp_path / "saved")
    same(stored(tmp_path / "new"), stored(tmp_path / "saved"))


def test_shards_keep_every_tensor(tmp_path: Path) -> None:
    """Shards with their index, the embeddings and the tied head in different ones; written into shards of another size."""
    tensors = pickle_folder(tmp_path / "law", "llama_tied")
    (tmp_path / "law" / "pytorch_model.bin").unlink()
    tensors[HEAD] = tensors[EMBED].clone()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    others = [name for name in tensors if name != HEAD]
    halves = [{name: tensors[name] for name in others}, {HEAD: tensors[HEAD], **{name: tensors[name] for name in others[20:]}}]
    halves[0] = {name: halves[0][name] for name in others[:20]}
    places = {}
    for index, half in enumerate(halves):
        file = f"pytorch_model-{index + 1:05d}-of-00002.bin"
        torch.save(half, tmp_path / "law" / file)
        places |= dict.fromkeys(half, file)
    assert places[HEAD] != places[EMBED]
    (tmp_path / "law" / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    result = convert(tmp_path / "law", tmp_path / "new", max_shard_size="20KB")
    assert len(result.files) > 2
    opened = open_checkpoint(tmp_path / "new")
    assert opened.tensors.keys() == tensors.keys() - {HEAD} and opened.notes == ()
    same(stored(tmp_path / "new"), {name: tensor for name, tensor in tensors.items() if name != HEAD})
    (tmp_path / "law" / PICKLED_INDEX).unlink()  # and without it
    convert(tmp_path / "law", tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "new").keys()
    assert not (tmp_path / "again" / INDEX).exists()


def test_dtypes_shapes_and_an_old_file_stay_as_they_are(tmp_path: Path) -> None:
    tensors = pickle_folder(tmp_path / "law")
    shared = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    odd = {
        "bf16": torch.randn(3, 5).bfloat16(), "f16": torch.randn(2).half(), "f64": shared, "int": torch.arange(5), "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "view": shared.t(), "row": shared[1],
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]), "param": torch.nn.Parameter(torch.ones(2, 2)), "wide": torch.ones(1, 3).expand(4, 3),
    }  # fmt: skip
    (tmp_path / "law" / "pytorch_model.bin").unlink()
    torch.save({**tensors, **odd}, tmp_path / "law" / "model.pt", _use_new_zipfile_serialization=False)
    result = convert(tmp_path / "law" / "model.pt", tmp_path / "new")
    same(stored(tmp_path / "new"), {**tensors, **odd})
    assert result.notes == ("f64 and view and row share their memory: each is written for itself",)


def test_a_tied_head_that_differs_is_kept(tmp_path: Path) -> None:
    """It is for a merge to say what counts: nothing is dropped that is not there twice."""
    tensors = pickle_folder(tmp_path / "law", "llama_tied")
    tensors[HEAD] = tensors[EMBED] + 1
    torch.save(tensors, tmp_path / "law" / "pytorch_model.bin")
    assert convert(tmp_path / "law", tmp_path / "new").notes == ()
    same(stored(tmp_path / "new"), tensors)


# ---- what a file may hold --------------------------------------------------------------------------------------------------

ONE = torch.ones(1)


@pytest.mark.parametrize(("document", "left_out"), [
    ({"a": ONE}, {}),
    ({"state_dict": {"a": ONE}, "epoch": 3}, {"epoch": "int"}),
    ({"model": {"a": ONE}, "optimizer": {"x": ONE}}, {"optimizer": "dict"}),
    ({"module": {"state_dict": {"a": ONE, "version": "1"}}, "lr": 0.1}, {"lr": "float", "module.state_dict.version": "str"}),
    ({"a": ONE, "step": 7, "model": {"b": ONE}}, {"step": "int", "model": "dict"}),
])  # fmt: skip
def test_a_state_dict_is_found_in_what_trainers_save(document: Any, left_out: dict[str, str]) -> None:
    assert find(document) == ({"a": ONE}, left_out)


@pytest.mark.parametrize(("document", "message"), [
    ([ONE], "it is a list, and no state dict"),
    (ONE, "it is a Tensor, and no state dict"),
    ({}, "no tensor is in it"),
    ({"state_dict": {"x": 1}}, r"no tensor is in it \(looked in state_dict\)"),
    ({3: ONE}, "a tensor's name is the int 3"),
    ({"model": {"model": {"model": {"model": {"model": {"a": ONE}}}}}}, "no tensor is in it"),
])  # fmt: skip
def test_what_is_no_state_dict(document: Any, message: str) -> None:
    with pytest.raises(Unfit, match=message):
        find(document)


def test_what_trainers_save_beside_the_model_is_said(tmp_path: Path, run: Any) -> None:
    tensors = pickle_folder(tmp_path / "law", wrap=lambda t: {"state_dict": t, "epoch": 3, "lr_schedulers": []})
    result: Result = run("convert", tmp_path / "law", tmp_path / "new")
    left_out = "pytorch_model.bin also holds epoch (int), lr_schedulers (list), which is no tensor of the model: left out"
    assert result.err == f"bam-merge: {left_out}.\n"
    same(stored(tmp_path / "new"), tensors)


# ---- what is refused -------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def with_index(places: dict[str, str]) -> Callable[[Path], None]:
    return lambda folder: (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": places})) and None


def instead(document: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda folder: torch.save(document(), folder / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (lambda law: (law / "config.json").unlink(), "HOME/law: config.json is missing. Put the model's there, beside pytorch_model.bin."),
    "safetensors already": (lambda law: (law / "model.safetensors").touch(), "HOME/law: has safetensors files already, so there is nothing to convert. Use it as it is."),
    "nothing pickled": (lambda law: (law / "pytorch_model.bin").unlink(), "HOME/law: no file of pickled weights (.bin, .pt, .pth) is in it."),
    "which file": (lambda law: ((law / "pytorch_model.bin").rename(law / "a.pt"), (law / "b.pt").touch()), "HOME/law: a.pt, b.pt: which of them is the model? Give that file in place of the folder."),
    "a shard missing": (lambda law: (law / "pytorch_model.bin").rename(law / "pytorch_model-00001-of-00002.bin"), "HOME/law: pytorch_model-00002-of-00002.bin missing, or of another model. Is the download complete?"),
    "an index of other files": (with_index({"a": "../x.bin"}), "HOME/law/pytorch_model.bin.index.json: names ../x.bin, which is no plain file in this folder."),
    "an index of missing files": (with_index({"a": "y.bin"}), "HOME/law: y.bin missing, of 1 files that pytorch_model.bin.index.json names."),
    "an index of other tensors": (with_index({"a": "pytorch_model.bin"}), "HOME/law/pytorch_model.bin.index.json: lists a, which no file holds. Is the download complete?\nHOME/law/pytorch_model.bin.index.json: does not list model.embed_tokens.weight, model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight and 18 more, which the files hold."),
    "cut off": (cut, "HOME/law/pytorch_model.bin: damaged, or no file of torch ("),
    "no weights": (lambda law: (law / "pytorch_model.bin").write_text("hello"), "HOME/law/pytorch_model.bin: damaged, or no file of torch ("),
    "empty": (lambda law: (law / "pytorch_model.bin").write_text(""), "HOME/law/pytorch_model.bin: damaged, or no file of torch (EOFError)."),
    "a sparse tensor": (instead(lambda: {"a": torch.eye(3).to_sparse()}), "HOME/law/pytorch_model.bin: a is no plain tensor (torch.sparse_coo, cpu), which safetensors files cannot hold. Nothing was written."),
    "a quantised tensor": (instead(lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), "HOME/law/pytorch_model.bin: a is a quantised tensor, which safetensors files cannot hold. Nothing was written."),
    "a complex double": (instead(lambda: {"a": torch.zeros(2, dtype=torch.complex128)}), "HOME/law/pytorch_model.bin: a is stored as torch.complex128, which safetensors files cannot hold. Nothing was written."),
    "an adapter": (lambda law: ((law / "pytorch_model.bin").rename(law / "adapter_model.bin"), (law / "config.json").unlink()), "HOME/law: this is an adapter, no model by itself."),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quant.*", "ignore:.*TypedStorage.*")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_in_words(name: str, tmp_path: Path, run: Any) -> None:
    damage, message = REFUSED[name]
    pickle_folder(tmp_path / "law")
    damage(tmp_path / "law")
    before = tree(tmp_path)
    result: Result = run("convert", tmp_path / "law", tmp_path / "new")
    assert (result.status, result.out) == (2, "")
    lines = [line.removeprefix("error: ") for line in result.err.replace(str(tmp_path), "HOME").splitlines()]
    for line, expected in zip(lines, message.split("\n"), strict=False):
        assert line.startswith(expected)
    assert "Traceback" not in result.err
    assert tree(tmp_path) == before


def test_a_tensor_in_two_shards(tmp_path: Path, run: Any) -> None:
    pickle_folder(tmp_path / "law", name="pytorch_model-00001-of-00002.bin")
    shutil.copy(tmp_path / "law" / "pytorch_model-00001-of-00002.bin", tmp_path / "law" / "pytorch_model-00002-of-00002.bin")
    result: Result = run("convert", tmp_path / "law", tmp_path / "new")
    assert result.status == 2
    assert "pytorch_model-00002-of-00002.bin: lm_head.weight is in pytorch_model-00001-of-00002.bin too. Keep one." in result.err


# ---- where it goes ---------------------------------------------------------------------------------------------------------


def test_the_rules_of_the_output_are_those_of_a_merge(tmp_path: Path, run: Any) -> None:
    tensors = pickle_folder(tmp_path / "law")
    law, new = tmp_path / "law", tmp_path / "new"
    for output, message in (
        (law, "is, or holds, HOME/law, which is converted. Choose another folder."), (tmp_path, "which is converted"),
        (law / "inside", "is inside HOME/law, which is converted"), ("/", "is, or holds, "),
    ):  # fmt: skip
        result = run("convert", law, output, "--force")
        assert (result.status, result.out) == (2, "")
        assert message in result.err.replace(str(tmp_path), "HOME")
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    assert "new already exists. Choose another OUTPUT, or replace it as a whole with --force." in run("convert", law, new).err
    assert "is not a checkpoint folder, so --force will not delete it" in run("convert", law, new, "--force").err
    assert (new / "notes.txt").read_text() == "mine"
    (new / "notes.txt").unlink()
    shutil.copytree(law, new, dirs_exist_ok=True)
    assert run("convert", law, new, "--force").status == 0
    assert sorted(path.name for path in new.iterdir()) == ["config.json", "model.safetensors"]
    same(stored(new), tensors)
    assert not list(tmp_path.glob(".*"))


def test_sizes_and_paths_are_checked(tmp_path: Path, run: Any) -> None:
    pickle_folder(tmp_path / "law")
    assert "no such folder" in run("convert", tmp_path / "none", tmp_path / "new").err
    assert "no file of pickled weights" in run("convert", tmp_path / "law" / "config.json", tmp_path / "new").err
    result = run("convert", tmp_path / "law", tmp_path / "new", "--max-shard-size", "x")
    assert (result.status, "'x' is no size" in result.err) == (2, True)
    assert not (tmp_path / "new").exists()
