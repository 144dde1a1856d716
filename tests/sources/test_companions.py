"""The files beside the weights: what of them reaches the output, and from where they may come."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, Result, write_recipe, write_sources

from bam_merge.checkpoints import header
from bam_merge.checkpoints.folder import PROCESSOR_FILES
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.sources import companions
from bam_merge.sources.companions import companion, companion_notes, read_companion

TRAP = {"AutoTokenizer": ["evil.Tokenizer", None]}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

GOOD: dict[str, dict[str, Any]] = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "added_tokens": [{"id": 1, "content": "auto_map", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "auto_map": 1, "trust_remote_code": 2}, "merges": []},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "model_max_length": 1000000000000000019884624838656, "bos_token": "<s>", "pad_token": None,
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
        "added_tokens_decoder": {"0": {"content": "a", "lstrip": False, "special": True}}, "additional_special_tokens": ["<x>", {"content": "<y>"}],
        "extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>", "sp_model_kwargs": {}, "add_bos_token": True,
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": TEMPLATE}], "padding_side": "left",
        "clean_up_tokenization_spaces": False, "legacy": None, "processor_class": "LlavaProcessor", "model_input_names": ["input_ids"],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "</s>", "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"auto_map": 3, "<x>": 4},
    "vocab.json": {"a": 0, "auto_map": 1, "trust_remote_code": 2},
    "chat_template.json": {"chat_template": TEMPLATE},
    "generation_config.json": {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.95,
        "bad_words_ids": [[1, 2]], "stop_strings": ["\n"], "watermarking_config": {"greenlist_ratio": 0.25}, "of_another_library": [0, [1.5, None, True]], "transformers_version": "5.23.0",
    },
    "tekken.json": {"config": {"pattern": ".", "default_num_special_tokens": 0}, "vocab": [{"rank": 0, "token_bytes": "YQ=="}]},
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "image_mean": [0.5, 0.5, 0.5], "resample": 3,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "crop_size": None, "do_resize": True, "data_format": "channels_first",
        "_valid_processor_keys": ["images", "do_resize"], "image_token": "<image>", "return_tensors": None,
    },
    "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "max_frames": 768, "video_metadata": None},
    "processor_config.json": {
        "processor_class": "Qwen3VLProcessor", "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16},
        "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"longest_edge": 25165824}}, "chat_template": TEMPLATE,
    },
}  # fmt: skip
"""Nothing of these is left out; a token may have any text."""


def escaped(key: str) -> str:
    """The key, JSON's way: its first letter as an escape, so that a search of the bytes does not find it."""
    return json.dumps(key).replace(key[0], f"\\u{ord(key[0]):04x}", 1)


def with_member(document: Any, key: str, value: Any) -> str:
    """The document's text with one more member, `key` being JSON already."""
    text = json.dumps(document)
    return text[:-1] + (", " if document else "") + f"{key}: {json.dumps(value)}" + "}"


def put(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(data)
    return path


def keys_of(value: Any) -> set[str]:
    """Every key at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


# ---- allow-lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_what_is_known_is_copied_byte_for_byte(name: str, tmp_path: Path) -> None:
    for text in (json.dumps(GOOD[name]), json.dumps(GOOD[name], indent=7) + "\r\n"):
        path = put(tmp_path, name, text)
        assert companion(path) == text.encode()
    assert list(companion_notes(tmp_path, [name])) == []


CODE = ["auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "code_revision"]
PLACES = ["name_or_path", "_name_or_path", "vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "fast_tokenizer_files", "init_inputs", "hf_token", "use_auth_token", "tokenizer_object", "_attn_implementation", "AUTO_MAP", " auto_map"]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in GOOD for key in (*CODE, *PLACES) if key not in GOOD[name]])
def test_what_would_run_code_or_lead_elsewhere_is_left_out(name: str, key: str, tmp_path: Path) -> None:
    """In whichever spelling JSON has for the key; the rest stays as it is, and the plan says what was left out."""
    for spelling in (json.dumps(key), escaped(key)):
        path = put(tmp_path, name, with_member(GOOD[name], spelling, TRAP))
        assert json.loads(companion(path)) == GOOD[name]
        assert list(companion_notes(tmp_path, [name])) == [f"{name}: {key} not copied: only keys that are known to be harmless are."]


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "a", "auto_map": TRAP}}}),
        ("tokenizer_config.json", {"chat_template": [{"name": "x", "template": "y", "auto_map": TRAP}]}),
        ("tokenizer_config.json", {"sp_model_kwargs": {"trust_remote_code": True, "model_file": "/etc/passwd"}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"auto_map": {"content": "x"}}}),
        ("tokenizer_config.json", {"bos_token": {"content": "x", "auto_map": TRAP}}),
        ("special_tokens_map.json", {"bos_token": {"content": "x", "auto_map": TRAP}}),
        ("generation_config.json", {"watermarking_config": {"auto_map": TRAP}}),
        ("generation_config.json", {"cache_config": {"deeper": {"auto_map": TRAP}}}),
        ("chat_template.json", {"chat_template": {"auto_map": TRAP, "default": TEMPLATE}}),
        ("tokenizer.json", {"model": {"vocab": {"auto_map": TRAP}}}),
        ("tokenizer.json", {"model": {"vocab": {}, "auto_map": 1}, "decoder": {"auto_map": TRAP}}),
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": "a", "auto_map": 1}], "model": {}}),
        ("tekken.json", {"vocab": [{"auto_map": TRAP}], "config": {"trust_remote_code": 1}}),
        ("preprocessor_config.json", {"size": {"auto_map": 1}}),
        ("processor_config.json", {"image_processor": {"auto_map": TRAP, "patch_size": 16}}),
        ("processor_config.json", {"video_processor": {"size": {"auto_map": 1}, "model_file": "/etc/passwd"}}),
    ],
)
def test_no_depth_hides_a_key(name: str, document: Any, tmp_path: Path) -> None:
    text = json.dumps(document).replace("auto_map", "\\u0061uto_map")
    kept = keys_of(json.loads(companion(put(tmp_path, name, text))))
    assert not kept & {"auto_map", "trust_remote_code", "model_file"}
    assert len(list(companion_notes(tmp_path, [name]))) == 1


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": ["evil", "Tokenizer"]}),
        ("tokenizer_config.json", {"processor_class": "../evil"}),
        ("tokenizer_config.json", {"chat_template": {"default": {"path": "x"}}}),
        ("tokenizer_config.json", {"model_max_length": {"x": 1}}),
        ("tokenizer_config.json", {"api_token": "abc"}),
        ("tokenizer_config.json", {"bos_token": 7}),
        ("tokenizer_config.json", {"vocab": "/etc/passwd"}),
        ("special_tokens_map.json", {"vocab": "/etc/passwd"}),
        ("special_tokens_map.json", {"tokenizer_object": "x"}),
        ("generation_config.json", {"compile_config": {"backend": "x"}}),
        ("generation_config.json", {"assistant_model": "org/name"}),
        ("generation_config.json", {"of_another_library": [0, ["org/name"]]}),
        ("generation_config.json", {"cache_config": {"cache_dir": "/x"}}),
        ("generation_config.json", {"temperature": {"x": 1}}),
        ("chat_template.json", {"chat_template": 7}),
        ("tokenizer.json", {"tokenizer_file": "x"}),
        ("added_tokens.json", {"<x>": {"content": 1}}),
        ("vocab.json", {"a": True}),
        ("preprocessor_config.json", {"image_processor_type": "evil.Processor"}),
        ("preprocessor_config.json", {"size": {"path": "/etc/passwd"}}),
        ("preprocessor_config.json", {"data_format": "/etc/passwd"}),
        ("preprocessor_config.json", {"image_processor": {"image_processor_type": "a b"}, "_valid_processor_keys": ["../x"]}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "X", "audio_tokenizer_name_or_path": "org/name"}}),
        ("processor_config.json", {"tokenizer": {"vocab_file": "/etc/passwd"}, "device": "cuda"}),
    ],
)
def test_a_value_of_another_kind_stays_behind(name: str, document: Any, tmp_path: Path) -> None:
    kept = json.loads(companion(put(tmp_path, name, document)))
    assert [value for value in kept.values() if value != {}] == []  # of a processor's section what is left of it


def test_every_setting_of_transformers_generation_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    unknown = {key for key in vars(transformers.GenerationConfig()) if key not in companions.GENERATION}
    assert unknown == {"compile_config", "continuous_batching_config"}


def test_what_transformers_saves_is_copied_as_it_is(tmp_path: Path) -> None:
    """A tokenizer with every kind of special token and two chat templates, saved and copied, loads as the same tokenizer."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1, "<s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", model_max_length=9, padding_side="left", chat_template=TEMPLATE,
        extra_special_tokens=["<x>", "<y>"], pad_token=tokenizers.AddedToken("<pad>", lstrip=True, special=True), truncation_side="left",
    )  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    saved.save_pretrained(tmp_path / "a", save_jinja_files=False)
    transformers.GenerationConfig(do_sample=True, top_k=5, stop_strings=["x"], eos_token_id=[1, 2]).save_pretrained(tmp_path / "a")
    names = sorted(os.listdir(tmp_path / "a"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    for name in names:
        data = companion(tmp_path / "a" / name)
        assert data == (tmp_path / "a" / name).read_bytes()
        put(tmp_path / "b", name, data)
    assert list(companion_notes(tmp_path / "a", names)) == []
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert loaded.get_vocab() == saved.get_vocab() and loaded.chat_template == TEMPLATE and loaded.pad_token == "<pad>"


BROKEN: dict[str, tuple[str, Any, str]] = {
    "a key twice": ("generation_config.json", '{"top_k": 1, "\\u0074op_k": 2}', "the key 'top_k' stands twice"),
    "auto_map twice": ("tokenizer_config.json", '{"auto_map": 1, "\\u0061uto_map": 2}', "the key 'auto_map' stands twice"),
    "NaN": ("generation_config.json", '{"top_p": NaN}', "NaN is not a JSON number"),
    "a number beyond float64": ("generation_config.json", '{"top_p": 1e999}', "1e999 is beyond float64"),
    "a byte order mark": ("special_tokens_map.json", b"\xef\xbb\xbf{}", "not valid JSON"),
    "UTF-16": ("chat_template.json", '{"chat_template": "x"}'.encode("utf-16"), "not UTF-8 text"),
    "half a surrogate": ("special_tokens_map.json", '{"bos_token": "\\ud800"}', "the lone surrogate"),
    "an array": ("generation_config.json", "[]", "not a JSON object"),
    "depth": ("tokenizer_config.json", '{"x": ' * 100 + "1" + "}" * 100, "nested more than 64 deep"),
    "cut short": ("generation_config.json", '{"top_k": 1', "not valid JSON"),
    "a template in latin-1": ("chat_template.jinja", b"\xe9", "not UTF-8 text (byte 0)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_ambiguous_file_is_refused_in_the_plan(name: str, llamas: Path, run: Any) -> None:
    file, content, words = BROKEN[name]
    put(llamas / "seed", file, content)
    result: Result = run(write_recipe(llamas))
    assert result.status == 2 and f"error: sources.seed: {llamas}/seed/{file}: " in result.err and words in result.err
    assert not (llamas / "out").exists() and not (llamas / ".out.bam-merge").exists()


def test_a_huge_file_is_refused_before_it_is_read(llamas: Path, run: Any) -> None:
    with open(llamas / "seed" / "chat_template.jinja", "wb") as stream:
        stream.truncate(100_000_001)
    result: Result = run("plan", write_recipe(llamas))
    assert result.status == 2 and "chat_template.jinja: larger than 100,000,000 bytes" in result.err


def test_a_merge_says_what_it_left_out_and_transformers_finds_nothing_to_run(llamas: Path, run: Any) -> None:
    """All files at once, each with an escaped auto_map; the output's are what GOOD says, and merge and plan name what is missing."""
    good = {
        name: document
        for name, document in GOOD.items()
        if name not in {"vocab.json", "tekken.json", "added_tokens.json", *PROCESSOR_FILES}
    }
    for name, document in good.items():
        put(llamas / "seed", name, with_member(document, escaped("auto_map"), TRAP))
    put(llamas / "seed", "chat_template.jinja", TEMPLATE)
    recipe = write_recipe(llamas)
    result: Result = run(recipe, "--no-verify")
    assert result.status == 0, result.err
    for name, document in good.items():
        assert json.loads((llamas / "out" / name).read_bytes()) == document
        assert f"bam-merge: sources.seed: {name}: auto_map not copied" in result.err
    assert (llamas / "out/chat_template.jinja").read_text() == TEMPLATE
    digests = json.loads((llamas / "out/bam_merge.json").read_text())["files"]
    assert good.keys() | {"chat_template.jinja"} <= digests.keys()
    assert sum("auto_map not copied" in note for note in plan_file(recipe).notes) == len(good)


def test_folders_and_other_tokenizers_are_not_copied_and_that_is_said(llamas: Path, run: Any) -> None:
    (llamas / "seed/additional_chat_templates").mkdir()
    put(llamas / "seed/additional_chat_templates", "rag.jinja", TEMPLATE)
    put(llamas / "seed", "tokenizer.model.v3", b"x")
    result: Result = run(write_recipe(llamas), "--no-verify")
    assert result.status == 0
    assert "sources.seed: additional_chat_templates/ is not copied: the output has the default chat template alone." in result.err
    assert "sources.seed: tokenizer.model.v3 not copied, and not compared" in result.err
    assert not (llamas / "out/additional_chat_templates").exists() and not (llamas / "out/tokenizer.model.v3").exists()


def test_tekken_is_copied(llamas: Path, run: Any) -> None:
    for name in ("seed", "code", "law"):
        put(llamas / name, "tekken.json", GOOD["tekken.json"])
    assert run(write_recipe(llamas), "--no-verify").status == 0
    assert json.loads((llamas / "out/tekken.json").read_text()) == GOOD["tekken.json"]


# ---- links -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a model, a secret beside it and another model."""
    for name in ("model", "other", "ssh"):
        (tmp_path / name).mkdir()
    put(tmp_path / "ssh", "id_rsa", "secret")
    put(tmp_path / "other", "merges.txt", "a b\n")
    return tmp_path


def escape_by(home: Path, how: str) -> Path:
    """A companion of the model that leads out of it in one of many ways."""
    path = home / "model/merges.txt"
    match how:
        case "absolute":
            path.symlink_to(home / "ssh/id_rsa")
        case "relative":
            path.symlink_to("../ssh/id_rsa")
        case "chained":
            (home / "model/inner").symlink_to("../ssh/id_rsa")
            path.symlink_to("inner")
        case "through a folder":
            (home / "model/keys").symlink_to("../ssh")
            path.symlink_to("keys/id_rsa")
        case "another model":
            path.symlink_to("../other/merges.txt")
        case "a name with the model's as its beginning":
            (home / "model2").mkdir()
            put(home / "model2", "x", "secret")
            path.symlink_to("../model2/x")
        case "out and in and out":
            path.symlink_to("../model/../ssh/id_rsa")
        case "proc":
            path.symlink_to("/proc/self/environ")
    return path


HOWS = ["absolute", "relative", "chained", "through a folder", "another model", "a name with the model's as its beginning", "out and in and out", "proc"]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("proc", [True, False])
def test_a_link_out_of_the_folder_is_refused(how: str, proc: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system has no /proc to ask what was opened."""
    path = escape_by(home, how)
    if not proc:
        real = os.readlink
        monkeypatch.setattr(companions.os, "readlink", lambda link: _absent() if str(link).startswith("/proc/self/fd") else real(link))
    with pytest.raises(CheckpointError, match="a link that leads out of the model's folder") as caught:
        companion(path)
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)


def _absent() -> Any:
    raise FileNotFoundError


@pytest.mark.parametrize("proc", [True, False])
def test_links_within_the_folder_and_to_it_are_followed(proc: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not proc:
        real = os.readlink
        monkeypatch.setattr(companions.os, "readlink", lambda link: _absent() if str(link).startswith("/proc/self/fd") else real(link))
    (home / "model/deep").mkdir()
    put(home / "model/deep", "x", "a b\n")
    (home / "model/merges.txt").symlink_to("deep/x")
    (home / "model/vocab.txt").symlink_to("../model/merges.txt")
    (home / "link").symlink_to("model")
    (home / "link to a link").symlink_to("link")
    for folder in ("model", "link", "link to a link", "other/../link"):
        assert companion(home / folder / "merges.txt") == companion(home / folder / "vocab.txt") == b"a b\n"
    monkeypatch.chdir(home / "model")
    assert companion(Path("merges.txt")) == b"a b\n"


def cache(home: Path, blobs: Path | None = None) -> Path:
    """A snapshot of a hub cache, whose blobs may be a link to another disk."""
    repository = home / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    if blobs is None:
        (repository / "blobs").mkdir()
    else:
        (repository / "blobs").symlink_to(blobs)
    return snapshot


@pytest.mark.parametrize("digest", ["a" * 40, "0" * 64])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_hub_cache_leads_to_its_blobs(digest: str, elsewhere: bool, home: Path) -> None:
    disk = home / "disk"
    disk.mkdir()
    snapshot = cache(home, disk if elsewhere else None)
    put(snapshot.parent.parent / "blobs", digest, "a b\n")
    (snapshot / "merges.txt").symlink_to(f"../../blobs/{digest}")
    (snapshot / "sub").mkdir()
    (snapshot / "sub/merges.txt").symlink_to(f"../../../blobs/{digest}")
    (home / "my-model").symlink_to(snapshot)
    for folder in (snapshot, snapshot / "sub", home / "my-model"):
        assert companion(folder / "merges.txt") == b"a b\n"


def test_a_local_folder_leads_to_the_blobs_of_a_hub_cache(home: Path) -> None:
    """As clients before huggingface_hub 0.23 laid out large files of a local folder. Nothing of a cache but its blobs, by their digest."""
    snapshot = cache(home)
    blobs = snapshot.parent.parent / "blobs"
    (home / "model/merges.txt").symlink_to(put(blobs, "f" * 64, "a b\n"))
    assert companion(home / "model/merges.txt") == b"a b\n"
    for name, target in {"vocab.txt": put(blobs, "token", "x"), "vocab.json": put(home / "ssh", "f" * 64, "x")}.items():
        (home / "model" / name).symlink_to(target)
        with pytest.raises(CheckpointError, match="a link that leads out"):
            companion(home / "model" / name)


def test_a_hub_cache_leads_nowhere_else(home: Path) -> None:
    snapshot = cache(home)
    put(snapshot.parent.parent / "blobs", "a" * 40, "x")
    (snapshot.parent.parent / "blobs" / ("b" * 40)).symlink_to(home / "ssh/id_rsa")
    put(snapshot.parent.parent, "refs", "x")
    links = {
        "merges.txt": "../../../ssh/id_rsa", "vocab.txt": f"../../blobs/{'b' * 40}", "tokenizer.model": "../../refs",
        "vocab.json": "../../blobs/../../ssh/id_rsa",
    }  # fmt: skip
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
        with pytest.raises(CheckpointError, match="a link that leads out"):
            companion(snapshot / name)


def test_blobs_that_are_a_link_to_somebodys_folder(home: Path) -> None:
    """Who ships a folder laid out like a cache could link its blobs to ~/.ssh: nothing there but digests counts as a blob."""
    snapshot = cache(home, home / "ssh")
    (snapshot / "merges.txt").symlink_to("../../blobs/id_rsa")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        companion(snapshot / "merges.txt")


@pytest.mark.parametrize("source", ["seed", "code"])
@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json", "generation_config.json", "chat_template.jinja", "tekken.json"])
def test_a_merge_refuses_a_link_that_leads_out(source: str, name: str, llamas: Path, run: Any) -> None:
    secret = put(llamas, "id_rsa", "secret")
    (llamas / source / name).symlink_to(secret)
    result: Result = run(write_recipe(llamas))
    assert result.status == 2
    assert f"error: sources.{source}: {llamas}/{source}/{name}: a link that leads out of the model's folder, to {secret}." in result.err
    assert not (llamas / "out").exists()


def test_a_link_put_in_place_after_the_plan_is_refused_too(llamas: Path) -> None:
    from bam_merge import MergeOptions
    from bam_merge.publishing.publish import publish

    path = put(llamas / "seed", "chat_template.jinja", TEMPLATE)
    plan = plan_file(write_recipe(llamas))
    path.unlink()
    path.symlink_to(put(llamas, "id_rsa", "secret"))
    with pytest.raises(CheckpointError, match="a link that leads out"):
        publish(plan, None, MergeOptions(verify=False))
    assert not (llamas / "out").exists()


def test_what_is_opened_is_judged_and_not_the_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is a file of the model before and after, and a link to a secret at the one moment when it is opened."""
    path = put(home / "model", "merges.txt", "a b\n")
    real = header.open_regular

    def race(name: str) -> int:
        path.rename(home / "model/kept")
        path.symlink_to(home / "ssh/id_rsa")
        descriptor = real(name)
        path.unlink()
        (home / "model/kept").rename(path)
        return descriptor

    monkeypatch.setattr(companions, "open_regular", race)
    with pytest.raises(CheckpointError, match="a link that leads out"):
        read_companion(path)
    monkeypatch.setattr(companions.os, "readlink", lambda link: _absent())
    with pytest.raises(CheckpointError, match="a link that leads out"):
        read_companion(path)


def test_weights_and_config_may_be_links_to_anywhere(tmp_path: Path, run: Any) -> None:
    """People keep shards on another disk. What is linked is read as safetensors, or as JSON of which known keys are taken."""
    write_sources(tmp_path, CONFIGS["llama"])
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "code" / name).rename(tmp_path / name)
        (tmp_path / "code" / name).symlink_to(tmp_path / name)
    assert run(write_recipe(tmp_path), "--no-verify").status == 0
    (tmp_path / "law/config.json").unlink()
    (tmp_path / "law/config.json").symlink_to(put(tmp_path, "secret", "password=1"))
    result: Result = run("plan", write_recipe(tmp_path))
    assert result.status == 2 and "password" not in result.err


def test_a_directory_and_a_device_are_no_companions(home: Path) -> None:
    (home / "model/vocab.txt").mkdir()
    (home / "model/merges.txt").symlink_to("/dev/zero")
    os.mkfifo(home / "model/vocab.json")
    for name in ("vocab.txt", "merges.txt", "vocab.json"):
        with pytest.raises(BamMergeError, match="not a regular file"):
            companion(home / "model" / name)
