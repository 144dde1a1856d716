"""How a config.json says that weights are quantised: by which method, to how many bits, in which groups; and which tensors hold what.

Sources: transformers' quantization_config.py and quantizers/, and what the tools write (AutoAWQ, GPTQModel, bitsandbytes, HQQ, AQLM,
compressed-tensors, MLX, ...).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.text import printable

KEYS = ("quantization_config", "compression_config", "quantization")
"""Where it is said: today, in older compressed-tensors, in MLX."""


METHODS: dict[str, tuple[str, float | None, int | None]] = {
    "awq": ("AWQ", 4, 128),
    "gptq": ("GPTQ", 4, 128),
    "auto-round": ("AutoRound", 4, 128),
    "bitsandbytes": ("bitsandbytes", None, None),
    "hqq": ("HQQ", 4, 64),
    "eetq": ("EETQ", 8, None),
    "aqlm": ("AQLM", None, None),
    "mxfp4": ("MXFP4", 4, 32),
    "fp8": ("FP8", 8, None),
    "fbgemm_fp8": ("FP8 by FBGEMM", 8, None),
    "compressed-tensors": ("compressed-tensors", None, None),
    "modelopt": ("ModelOpt", None, None),
    "quark": ("Quark", None, None),
    "torchao": ("torchao", None, None),
    "quanto": ("quanto", None, None),
    "bitnet": ("BitNet", 2, None),
    "higgs": ("HIGGS", 4, None),
    "spqr": ("SpQR", 3, None),
    "vptq": ("VPTQ", None, None),
    "exl2": ("ExLlamaV2", None, None),
    "exl3": ("ExLlamaV3", None, None),
    "fp_quant": ("FP-Quant", 4, None),
    "sinq": ("SINQ", 4, 64),
    "mlx": ("MLX", 4, 64),
    "gguf": ("GGUF", None, None),
}
"""quant_method: its name, and the bits and the group that it has where the configuration says nothing."""


DEQUANTISED = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""The methods of which some forms are multiplied out on request (sources/dequantised.py)."""


BITS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "nbits_per_codebook")
GROUPS = ("group_size", "q_group_size", "in_group_size", "block_size")


PACKED = ("qweight", "weight_packed", "W_q", "q_weight", "weight_blocks", "blocks")
"""Names of tensors that hold a module's weights with several in one number, in the place of `weight`."""


BESIDE = re.compile(
    r"(qzeros|scales|g_idx|q_scale|q_scale_max|q_groups|q_group_map|q_invperm|q_perm|zero|scale|meta|biases|SCB|weight_format|codebooks|codes|"
    r"weight_scale|weight_scale_inv|weight_scale_2|weight_zero_point|weight_shape|weight_g_idx|weight_global_scale|input_global_scale|"
    r"input_scale|input_scale_ub|activation_scale|input_zero_point|output_scale|[kvq]_scale|kv_scale|"
    r"weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB))"
)
"""Names of what stands beside a module's quantised weights, and is no parameter of the model."""


@dataclass(frozen=True)
class Quantisation:
    """What a configuration says: `method` as it names it, `bits` of a weight and `group` weights to a scale where that is known."""

    key: str
    method: str
    bits: float | None
    group: int | None
    form: str
    settings: Mapping[str, Any]

    def words(self) -> str:
        """As messages say it: 'AWQ, 4 bits in groups of 128'."""
        name = METHODS[self.method][0] if self.method in METHODS else printable(repr(self.method), 40)
        parts = [f"{name}{f' {printable(self.form, 40)}' if self.form else ''}"]
        if self.bits is not None:
            parts.append(f"{self.bits:g} bits{f' in groups of {self.group}' if self.group else ''}")
        return ", ".join(parts)


def quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """What config.json says of quantised weights; None where it says that they are not. null and {} say that."""
    for key in KEYS:
        settings = config.get(key)
        if settings in (None, {}) or (key == "quantization" and not (isinstance(settings, dict) and "bits" in settings)):
            continue
        if not isinstance(settings, dict):
            return Quantisation(key, str(type(settings).__name__), None, None, "", {})
        return _read(key, settings)
    return None


def _read(key: str, settings: Mapping[str, Any]) -> Quantisation:
    method = settings.get("quant_method")
    if not isinstance(method, str):
        known = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "w_bit": "awq", "bits": "mlx"}
        method = next(
            (name for word, name in known.items() if word in settings), "compressed-tensors" if key == "compression_config" else "?"
        )
    nested: dict[str, Any] = next((settings[word] for word in ("quant_config", "weights") if isinstance(settings.get(word), dict)), {})
    inner = nested.get("weight_quant_params") if isinstance(nested.get("weight_quant_params"), dict) else nested
    scheme = _scheme(settings)
    where: tuple[Mapping[str, Any], ...] = (settings, inner or {}, scheme)
    bits = next((found[word] for found in where for word in BITS if _is_number(found.get(word))), None)
    group = next((found[word] for found in where for word in GROUPS if _is_number(found.get(word)) and found[word] > 0), None)
    form = ""
    if method == "bitsandbytes":
        four = bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
        bits, form = (4, str(settings.get("bnb_4bit_quant_type", "fp4"))) if four else (8, "int8")
        group = 64 if four else None
    elif method in ("torchao", "quanto", "eetq"):
        kind = settings.get("quant_type", settings.get("weights"))
        form = kind if isinstance(kind, str) else next(iter(kind), "") if isinstance(kind, dict) else ""
        bits = bits or _bits_in(form)
    elif method in ("compressed-tensors", "modelopt"):
        form = str(settings.get("format") or settings.get("quant_algo") or "")
    elif method == "fp8" and isinstance(block := settings.get("weight_block_size"), list):
        form = f"in blocks of {' x '.join(map(str, block))}"
    default = METHODS.get(method, ("", None, None))
    grouped = group if group is not None else default[2] if settings.get("group_size") is None else None
    return Quantisation(key, method, bits if bits is not None else default[1], grouped, form, settings)


def _scheme(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the first group of compressed-tensors' config_groups stores its weights."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            return weights
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bits_in(form: str) -> int | None:
    found = re.search(r"(?:int|float|uint|fp)_?([1-8])", form.lower())
    return int(found[1]) if found else None


# ---- tensors ---------------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str | None:
    """The weight that a tensor beside or in place of it belongs to: x.qweight and x.scales are of x.weight. None for any other tensor."""
    stem, _, last = name.rpartition(".")
    if last in PACKED:
        return f"{stem}.weight"
    found = re.search(rf"\.{BESIDE.pattern}$", name)
    return f"{name[: found.start()]}.weight" if found else None


def is_packed(entry: TensorEntry, quantised: Quantisation) -> bool:
    """Whether a tensor holds weights, several in one number."""
    last = entry.name.rpartition(".")[2]
    four = quantised.method == "bitsandbytes" and quantised.bits == 4
    return last in PACKED or (last == "weight" and four and entry.dtype == "U8") or (last == "weight" and _is_mlx(entry, quantised))


def _is_mlx(entry: TensorEntry, quantised: Quantisation) -> bool:
    return quantised.method == "mlx" and entry.dtype == "U32"


def weights_in(entry: TensorEntry, quantised: Quantisation) -> int | None:
    """How many weights a packed tensor holds, by its bits; None where nobody says how many bits one takes."""
    if quantised.bits is None or quantised.bits <= 0:
        return None
    return round(entry.numel * DTYPE_BITS[entry.dtype] / quantised.bits)


def is_beside(name: str, names: Iterable[str] | Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to the quantisation of another one, and is no parameter of the model."""
    found = re.search(rf"\.{BESIDE.pattern}$", name)
    return found is not None and any(f"{name[: found.start()]}.{last}" in names for last in ("weight", *PACKED, "codes"))


# ---- words -----------------------------------------------------------------------------------------------------------------


def quantised_refusal(source: str, path: Path, checkpoint: Checkpoint) -> str:
    """Why a quantised source cannot be merged as it is, and what to do: of 8-bit floats they can be multiplied out."""
    found = quantisation(checkpoint.config)
    assert found is not None
    head = f"config.json has a {found.key}"
    floats = [name for name, entry in checkpoint.tensors.items() if entry.dtype.startswith("F8_E") and name.endswith(".weight")]
    if found.method in DEQUANTISED and floats:
        return (
            f"{head} ({found.words()}): {len(floats)} weights are 8-bit floats with scales beside them. To merge what they stand for, "
            f"write sources: {{{source}: {{path: {printable(path.name)}, dequantise: true}}}}, which makes bfloat16 of them; or use the "
            "full-precision model."
        )
    if found.method == "fp8" or not found.settings.get("quant_method", found.method != "?"):
        return f"{head}; quantised weights cannot be merged. Use the full-precision model."
    return f"{head} ({found.words()}); quantised weights cannot be merged. Use the 16-bit model that it was made from."
