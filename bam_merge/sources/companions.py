"""The files beside the weights that an output takes from its seed: read from the model's own folder only, and written by allow-lists.

What a loader would run, or would fetch from another place, stays behind: transformers passes every key of tokenizer_config.json and
special_tokens_map.json on to the tokenizer's constructor (5.23, tokenization_utils_base.py, _from_pretrained).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import MAX_JSON, json_object
from bam_merge.checkpoints.header import open_regular
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.system import path_of
from bam_merge.text import printable, some

CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "code_revision"})
"""Keys by which transformers runs code, of this folder or of any repository: left out at any depth, in any spelling of their letters."""


VOCABULARY: dict[str, tuple[str, ...]] = {"added_tokens.json": (), "vocab.json": (), "tokenizer.json": ("model", "vocab")}
"""Where a file maps tokens to ids: there a key with an id is a token, whatever its text."""


def companion(path: Path) -> bytes:
    """A tokenizer or generation file as the output gets it: byte for byte, but for keys that are not on the list of its name.

    Raises CheckpointError when it leads out of the model's folder, cannot be read, or is ambiguous: a key twice, NaN, not UTF-8.
    """
    return _prepared(path)[0]


def companion_notes(folder: Path, names: Sequence[str], load: Callable[[bytes], Any] = load_json) -> Iterator[str]:
    """What of the files `names` of the seed's `folder` the output does not get. Raises CheckpointError, as companion.

    `load` parses JSON as load_json does: who has parsed a large file already need not do it twice.
    """
    for name in names:
        dropped = _prepared(folder / name, load)[1]
        if dropped:
            yield f"{name}: {some(dropped, 8)} not copied: only keys that are known to be harmless are."
    try:
        present = sorted(os.listdir(folder))
    except OSError:  # a folder whose files may be read and not listed
        present = []
    yield from left_behind(name for name in present if name != TEMPLATES or (folder / TEMPLATES).is_dir())


def left_behind(present: Iterable[str]) -> Iterator[str]:
    """Notes on what of these files and folders beside a model's weights no output gets."""
    present = list(present)
    if TEMPLATES in present:
        yield f"{TEMPLATES}/ is not copied: the output has the default chat template alone."
    others = [name for name in present if re.fullmatch(r"tokenizer\.model\..*|.*\.tiktoken|.*\.spm|spiece\.model|.*\.bpe\.model", name)]
    if others:
        yield f"{some(others)} not copied, and not compared: transformers does not read it for this family."


TEMPLATES = "additional_chat_templates"


def _prepared(path: Path, load: Callable[[bytes], Any] = load_json) -> tuple[bytes, list[str]]:
    """The bytes for the output, and the keys that were left out."""
    data = read_companion(path)
    if path.suffix != ".json":
        if path.suffix in {".txt", ".jinja"}:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{printable(str(path))}: not UTF-8 text (byte {error.start}).") from None
        return data, []
    document = json_object(path, data, load)
    dropped: list[str] = []
    kept = _without_code(document, (), VOCABULARY.get(path.name), dropped) if _has_code(document) else document
    if allowed := ALLOWED.get(path.name):
        kept = {key: value for key, value in kept.items() if _keep(key, allowed(key, value), dropped)}
    if not dropped:
        return data, []
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(), dropped


def _has_code(document: Any) -> bool:
    """Whether a key at any depth reads like one of CODE_KEYS: a quick look, for a vocabulary has 300,000 entries."""
    boxes = [document]
    while boxes:
        box = boxes.pop()
        if isinstance(box, dict):
            if not CODE_KEYS.isdisjoint(box) or (len(box) < 1000 and any(map(_is_code, box))):
                return True
            box = list(box.values())
        boxes += [item for item in box if isinstance(item, dict | list)]
    return False


def _is_code(key: str) -> bool:
    return key in CODE_KEYS or (len(key) < 40 and key.strip().casefold() in CODE_KEYS)


def _keep(key: str, allowed: bool, dropped: list[str]) -> bool:
    if not allowed:
        dropped.append(key)
    return allowed


def _without_code(value: Any, place: tuple[str, ...], vocabulary: tuple[str, ...] | None, dropped: list[str]) -> Any:
    """`value` without CODE_KEYS at any depth, except tokens of that name; the keys that are missing are added to `dropped`."""
    if isinstance(value, list):
        return [_without_code(item, (*place, "[]"), vocabulary, dropped) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        token = place == vocabulary and type(item) is int
        if not token and _is_code(key):
            dropped.append(".".join((*place, key)))
        else:
            kept[key] = _without_code(item, (*place, key), vocabulary, dropped)
    return kept


# ---- what each file may say ------------------------------------------------------------------------------------------------


def _plain(value: Any) -> bool:
    """A number, a text, true, false, null, or lists of such."""
    return all(map(_plain, value)) if isinstance(value, list) else not isinstance(value, dict)


ADDED = {"__type", "content", "id", "lstrip", "rstrip", "single_word", "normalized", "special"}


def _token(value: Any) -> bool:
    """A special token: its text, or an object that says how it is matched."""
    if isinstance(value, dict):
        return value.keys() <= ADDED and all(map(_plain, value.values()))
    return value is None or isinstance(value, str)


def _tokens(value: Any) -> bool:
    """Several special tokens: a list, or an object by name or id."""
    if isinstance(value, dict):
        value = list(value.values())
    return value is None or (isinstance(value, list) and all(map(_token, value)))


def _template(value: Any) -> bool:
    """A chat template, or several: text that transformers renders in a sandbox (jinja2's ImmutableSandboxedEnvironment)."""
    if isinstance(value, list):
        return all(isinstance(item, dict) and item.keys() <= {"name", "template"} and all(map(_text, item.values())) for item in value)
    return value is None or _text(value) or (isinstance(value, dict) and all(map(_text, value.values())))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _class(value: Any) -> bool:
    """A class by its bare name, which transformers looks up among its own."""
    return value is None or (isinstance(value, str) and value.isidentifier())


def _options(value: Any) -> bool:
    """Settings one level deep, none of which is a place."""
    return value is None or (isinstance(value, dict) and all(map(_plain, value.values())) and not any(map(_is_place, value)))


def _is_place(key: str) -> bool:
    return bool(re.search(r"file|path|dir|url|repo|model_proto", key.casefold()))


TOKENIZER_CONFIG: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "add_bos_token", "add_eos_token", "add_prefix_space", "add_special_tokens", "backend", "clean_up_tokenization_spaces",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "do_basic_tokenize", "do_lower_case",
            "do_lowercase", "errors", "fix_mistral_regex", "from_slow", "is_local", "keep_accents", "legacy", "legacy_behaviour",
            "local_files_only", "lowercase", "max_length", "max_len", "model_input_names", "model_max_length", "never_split", "normalize",
            "pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side", "remove_space", "return_token_type_ids",
            "sanitize_special_tokens", "spaces_between_special_tokens", "split_special_tokens", "stride", "strip_accents",
            "tokenize_chinese_chars", "tokenizer_type", "tokenizer_version", "transformers_version", "trim_offsets", "truncation",
            "truncation_side", "truncation_strategy", "unk_id", "use_default_system_prompt", "use_fast", "verbose", "vocab_size",
        ),
        _plain,
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"), _tokens
    ),
    **dict.fromkeys(("chat_template", "tool_use_template", "grounded_generation_template"), _template),
    **dict.fromkeys(("tokenizer_class", "processor_class"), _class),
    "sp_model_kwargs": _options,
}  # fmt: skip
"""Keys of tokenizer_config.json, beside names of special tokens, and what their values may be.

Left out, among others: where things lie on the machine that saved it (name_or_path, tokenizer_file, special_tokens_map_file), other files
to read a vocabulary from (vocab_file, merges_file, vocab, merges, fast_tokenizer_files), arguments for any constructor (init_inputs).
"""


CREDENTIALS = {"access", "api", "auth", "bearer", "github", "hf", "hub", "login", "refresh", "secret", "session", "wandb"}
"""Words of a key that ends in _token and holds no token of a text."""


def _special(key: str, value: Any) -> bool:
    """bos_token, image_token and their like: the name of a special token, and no key to a service."""
    words = key.casefold().split("_")
    return words[-1] == "token" and len(words) > 1 and CREDENTIALS.isdisjoint(words) and _token(value)


def _in_tokenizer_config(key: str, value: Any) -> bool:
    return TOKENIZER_CONFIG[key](value) if key in TOKENIZER_CONFIG else _special(key, value)


def _in_special_tokens_map(key: str, value: Any) -> bool:
    return _tokens(value) if key in {"additional_special_tokens", "extra_special_tokens"} else _special(key, value)


GENERATION: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
            "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation", "chat_format",
            "constraints", "decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample", "dola_layers",
            "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff",
            "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_decoder_ids",
            "forced_eos_token_id", "guidance_scale", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length",
            "max_matching_ngram_size", "max_new_tokens", "max_time", "max_window_size", "min_length", "min_new_tokens", "min_p",
            "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
            "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id",
            "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
            "repetition_penalty", "return_dict_in_generate", "sequence_bias", "speculation_type", "stop_strings", "suppress_tokens",
            "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "transformers_version", "typical_p",
            "use_cache", "use_mtp",
        ),
        _plain,
    ),
    **dict.fromkeys(("watermarking_config", "cache_config"), _options),
}  # fmt: skip
"""Keys of generation_config.json (transformers 5.23, GenerationConfig, and of older versions). How to compile stays out."""


def _in_generation_config(key: str, value: Any) -> bool:
    """A key that is not known may hold numbers, which GenerationConfig keeps as they are; a text could name another model, or a place."""
    return GENERATION[key](value) if key in GENERATION else _numbers(value)


def _numbers(value: Any) -> bool:
    return all(map(_numbers, value)) if isinstance(value, list) else value is None or isinstance(value, int | float)


TOKENIZER_SECTIONS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}


ALLOWED: dict[str, Callable[[str, Any], bool]] = {
    "tokenizer.json": lambda key, value: key in TOKENIZER_SECTIONS,
    "tokenizer_config.json": _in_tokenizer_config,
    "special_tokens_map.json": _in_special_tokens_map,
    "generation_config.json": _in_generation_config,
    "added_tokens.json": lambda key, value: type(value) is int,
    "vocab.json": lambda key, value: type(value) is int,
    "chat_template.json": lambda key, value: key == "chat_template" and _template(value),
    "tekken.json": lambda key, value: key in {"config", "vocab", "special_tokens", "type", "version"},
}
"""For each JSON file whether a key of it, with that value, goes into the output."""


# ---- where it is read from -------------------------------------------------------------------------------------------------


def read_companion(path: Path, limit: int = MAX_JSON) -> bytes:
    """The bytes of a file of the model's folder. A link may lead within the folder or into its hub cache's blobs, and nowhere else.

    What was opened is judged, not the name: between a look at a name and its opening it may become another file's.
    Raises CheckpointError.
    """
    descriptor = open_regular(str(path))
    with os.fdopen(descriptor, "rb") as stream:
        real = _real_path(descriptor, path)
        if real is None or not _belongs(real, path.parent):
            shown = "a file that could not be found again" if real is None else printable(real)
            raise CheckpointError(
                f"{printable(str(path))}: a link that leads out of the model's folder, to {shown}. What stands there could be "
                "anybody's, and would be copied into the output: put a copy of the file into the folder, or remove the link."
            )
        if os.fstat(descriptor).st_size > limit:
            raise CheckpointError(f"{printable(str(path))}: larger than {limit:,} bytes.")
        return stream.read(limit)


def _real_path(descriptor: int, path: Path) -> str | None:
    """The path, without links, of the file that was opened; None when it cannot be told."""
    real = path_of(descriptor) or os.path.realpath(path)
    try:
        same = os.path.samestat(os.lstat(real), os.fstat(descriptor))
    except OSError:
        return None
    return real if same else None


def _real_folder(folder: Path) -> str:
    """The path of a folder without links, spelled as it is on the disk: on macOS what a user types may differ in case."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return os.path.realpath(folder)
    try:
        return path_of(descriptor) or os.path.realpath(folder)
    finally:
        os.close(descriptor)


def _belongs(real: str, folder: Path) -> bool:
    """Whether the file at `real`, a path without links, is one of the model in `folder`.

    The hub's layout is models--ORG--NAME/{snapshots/REVISION/[FOLDER/]FILE, blobs/DIGEST}; older clients link a file of a local folder
    to such a blob, too. Who makes a link to a blob by its digest knows what is in it.
    """
    home = _real_folder(folder)
    if _inside(real, home):
        return True
    file = Path(real)
    digest = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.name) is not None
    if digest and file.parent.name == "blobs" and file.parents[1].name.startswith("models--"):
        return True
    for above in Path(home).parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            if digest and file == Path(_real_folder(above.parents[1])) / "blobs" / file.name[:2] / file.name:
                return True  # of the store that all models of a cache share
            blobs = above.parent / "blobs"  # which may be a link to another disk, or to anybody's folder: there only digests count
            return _inside(real, _real_folder(blobs)) and (digest or not blobs.is_symlink())
    return False


def _inside(real: str, folder: str) -> bool:
    return real.startswith(folder.rstrip("/") + "/")
