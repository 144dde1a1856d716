"""What each JSON file beside the weights may say: the keys of it that an output gets, and what their values may be.

transformers passes every key of tokenizer_config.json and special_tokens_map.json on to the tokenizer's constructor, and every key of a
processor's file to that of the processor (5.23, tokenization_utils_base.py, image_processing_base.py, processing_utils.py).
"""

import re
from collections.abc import Callable
from typing import Any

from bam_merge.checkpoints.folder import PROCESSOR_FILES


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


PROCESSOR_SECTIONS = ("image_processor", "video_processor")
"""Keys of processor_config.json whose values say what preprocessor_config.json and video_preprocessor_config.json say alone."""


PROCESSOR: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class"), _class),
    **dict.fromkeys(("data_format", "input_data_format"), lambda value: value in (None, "channels_first", "channels_last")),
    "chat_template": _template,
    "_valid_processor_keys": lambda value: isinstance(value, list) and all(map(_class, value)),
}
"""Keys of a processor's files (transformers 5.23, image_processing_utils.py, Qwen2-VL's and Qwen3-VL's processors) that hold texts."""


def _in_processor(key: str, value: Any) -> bool:
    """Numbers, alone, in lists or by name (sizes), may stand under any key; a text could name a place, or what a constructor calls."""
    sizes = isinstance(value, dict) and all(map(_numbers, value.values()))
    return PROCESSOR[key](value) if key in PROCESSOR else _numbers(value) or sizes or _special(key, value)


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
    **dict.fromkeys(PROCESSOR_FILES, _in_processor),
}
"""For each JSON file whether a key of it, with that value, goes into the output."""
