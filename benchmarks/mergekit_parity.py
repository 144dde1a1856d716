"""Compares the merge methods that bam-merge and mergekit both have, tensor by tensor, on small random float32 models.

    python benchmarks/mergekit_parity.py --mergekit DIR      DIR holds mergekit-yaml, of mergekit 0.1.5

Exit status 1 when a method that both define alike differs by more than 1e-6 of the tensor's largest magnitude, or when a case
said below to differ does not.

The same formula takes different settings. Everything here is about mergekit 0.1.5:

    linear            divides by the sum of the weights unless `normalize: false`. We require weights that sum to one.
    slerp             `base_model` is the model at t = 0; the other listed model is at t = 1.
    task_arithmetic   our `scale` is `lambda`; `normalize` (off by default) would divide by the sum of the weights.
    ties              our `scale` is `lambda`; `normalize: true` (the default) gives the paper's disjoint mean, weighted.
    dare_ties         off by default: with `normalize: false` the agreeing differences are summed, not averaged, so it needs
                      `normalize: true`. Below density 1 the two cannot be compared: both draw at random, and mergekit's
                      `rescale` restores the L1 norm of the difference where DARE's paper and we divide by the density.

    model_stock       no settings; `filter_wise` (off by default) would take every row by itself, which we have not.
    sce               our `density` is `select_topk`.
    ram               our `epsilon` is `epsilon`.
    breadcrumbs       our `scale` is `lambda`, our density and gamma are density and gamma, the same for every model.
    dare_linear       as dare_ties; `normalize` (off by default) would divide by the sum of the weights.
    della             as dare_ties. mergekit ranks equal magnitudes in the order of its sort, we give them the mean of their ranks.
    karcher           `max_iter` and `tol`: mergekit stops after ten steps, or at a pull below 1e-5; we go on to float64's last digits.
    nuslerp           our `t` is the second model's share of the weights, `by: rows` is `nuslerp_flatten: false`. With `base_model`
                      mergekit's is of the differences, and `nuslerp_row_wise` of the columns, which we have not.

Cases without settings of ours are carried out by the recipe that bam-merge prints for mergekit's own configuration.

Where the definitions part, each with a case of its own in CASES that shows it:

    zero sums         TIES elects the sign of the weighted sum. Where that sum is exactly zero although its terms are not, mergekit
                      takes plus and so keeps the positive terms; we take no sign and keep none: in the paper's algorithm sgn(0) is 0.
    equal magnitudes  TIES trims to the k largest. Where others equal the k-th, mergekit keeps exactly k, whichever its sort puts
                      first; we keep all that equal it, as the authors' own code does, so that no order decides.
    negative weights  mergekit divides by the sum of the weights that agree, signs and all, or by one where that is zero; we by the sum
                      of their magnitudes, so that a negative weight stands for the opposite difference.
    narrow angles     mergekit's slerp is a straight line above a cosine of 0.9995 (about 1.8 degrees); ours is an arc down to
                      angles where float64 cannot tell them apart (1e-7).
    small tensors     mergekit takes some magnitudes below 1e-6 for none (sce, model_stock), which small differences reach; we do not.
    opposite          Opposite directions have no Karcher mean: mergekit takes the first, we take the mean of the tensors.
    directions
    gradients         Over final norm and head a gradient of mergekit's has its first number, as over the embeddings; ours has its last.
                      Recipes that are printed for mergekit's say for each role what mergekit does.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import yaml
from common import bam_merge, machine, machine_line, markdown_table, run, write_recipe
from safetensors.numpy import load_file

from bam_merge.demo.synthetic import Values, branched_values, random_values, write_checkpoint
from bam_merge.recipe.mergekit import equivalent

VERSION = "0.1.5"
"""The mergekit that the cases and the text above were checked with."""

TOLERANCE = 1e-6
"""Largest difference allowed, as a share of the largest magnitude in the tensor: some 8 roundings of float32."""

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip

Tensors = dict[str, "numpy.ndarray[Any, Any]"]


# ---- the models ------------------------------------------------------------------------------------------------------------


def on_grid(values: Values, step: float) -> Values:
    """`values` rounded to multiples of `step`, a power of two: sums and differences of such numbers are exact."""

    def rounded(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any] | None":
        array = values(name, shape)
        return None if array is None else (numpy.round(array / step) * step).astype("f4")

    return rounded


def mirrored(centre: Values, side: Values) -> Values:
    """2 centre - side: as far from `centre` as `side`, in the opposite direction."""

    def opposite(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any] | None":
        middle, one = centre(name, shape), side(name, shape)
        assert middle is not None and one is not None
        return 2 * middle - one

    return opposite


def mixed(one: Values, other: Values, share: float) -> Values:
    """A weighted mean of two; `share` is the other's."""

    def between(name: str, shape: tuple[int, ...]) -> "numpy.ndarray[Any, Any] | None":
        a, b = one(name, shape), other(name, shape)
        assert a is not None and b is not None
        return ((1 - share) * a + share * b).astype("f4")

    return between


def write_models(folder: Path) -> None:
    """A seed and its branches: apart enough for every method to be well defined, and those that show a difference."""
    apart = 0.1  # twice the weights' own scale; the cosine of two norms, all near one, is then 0.99
    fine, coarse = 2.0**-10, 2.0**-6
    models = {
        "seed": random_values(0),
        **{name: branched_values(0, branch, apart) for branch, name in enumerate(("code", "law", "math"))},
        "near": branched_values(0, 3, drift=0.001),
        "nearer": branched_values(0, 4, drift=0.0001),
        "tiny": branched_values(0, 5, drift=1e-6),
        "tinier": branched_values(0, 5, drift=2e-6),
        "opposed": mirrored(random_values(0), mixed(branched_values(0, 0, apart), branched_values(0, 2, apart), 0.75)),
        "mirror": mirrored(lambda name, shape: numpy.zeros(shape, dtype="f4"), random_values(0)),
        "grid_seed": on_grid(random_values(0), fine),
        "grid_code": on_grid(branched_values(0, 0, apart), fine),
        "grid_mirror": mirrored(on_grid(random_values(0), fine), on_grid(branched_values(0, 0, apart), fine)),
        "coarse_seed": on_grid(random_values(0), coarse),
        "coarse_code": on_grid(branched_values(0, 0, apart), coarse),
    }
    for name, values in models.items():
        write_checkpoint(folder / name, CONFIG, values, "F32")


# ---- the cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One merge, described to both tools. `differs` says why the results are not the same; empty where they must be."""

    name: str
    shared: Mapping[str, Any]
    method: str
    models: Mapping[str, Mapping[str, Any]]
    base: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""

    def ours(self, models: str, output: str) -> dict[str, Any]:
        """The recipe for bam-merge: with no settings of ours the one that it prints for mergekit's."""
        if not self.shared:
            text = equivalent(self.theirs(Path(models).resolve())).text
            assert text is not None, f"{self.name} has no equivalent"
            return {**yaml.safe_load(text), "output": {"path": output}}
        names = dict.fromkeys([*([self.base] if self.base else []), *self.models])
        sources = {name: f"{models}/{name}" for name in names}
        return {"method": "merge", "sources": sources, "shared": dict(self.shared), "output": {"path": output}}

    def theirs(self, models: Path) -> dict[str, Any]:
        """The configuration for mergekit-yaml."""
        listed = [{"model": str(models / name), "parameters": dict(options)} for name, options in self.models.items()]
        config: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "models": listed}
        if self.base:
            config["base_model"] = str(models / self.base)
        if self.options:
            config["parameters"] = dict(self.options)
        return config


WEIGHTS = {"code": 1.0, "law": 0.6, "math": 0.3}
PLAIN: dict[str, dict[str, float]] = {"code": {}, "law": {}, "math": {}}


def differences(make: str, scale: float = 1.0, **settings: float) -> dict[str, Any]:
    """The `shared` section for a method of weighted differences from the seed."""
    return {"make": make, "base": "seed", "weights": WEIGHTS, "scale": scale, **settings}


def differing(make: str, **settings: float) -> dict[str, Any]:
    """The `shared` section for a method of differences from the seed that has no weights."""
    return {"make": make, "base": "seed", **settings}


def weighted(weights: Mapping[str, float], **settings: float) -> dict[str, dict[str, float]]:
    """mergekit's settings for each model."""
    return {name: {"weight": weight, **settings} for name, weight in weights.items()}


ALIKE = [
    Case(
        "mean",
        {"make": "mean"},
        "linear",
        weighted({"seed": 1.0, "code": 1.0, "law": 1.0, "math": 1.0}),
        options={"normalize": True},
    ),
    Case(
        "linear",
        {"make": "linear", "weights": {"seed": 0.1, "code": 0.2, "law": 0.3, "math": 0.4}},
        "linear",
        weighted({"seed": 0.1, "code": 0.2, "law": 0.3, "math": 0.4}),
        options={"normalize": False},
    ),
    Case("slerp", {"make": "slerp", "from": ["seed", "code"], "t": 0.3}, "slerp", {"seed": {}, "code": {}}, "seed", {"t": 0.3}),
    Case(
        "task_arithmetic",
        differences("task_arithmetic", 0.7),
        "task_arithmetic",
        weighted(WEIGHTS),
        "seed",
        {"normalize": False, "lambda": 0.7},
    ),
    Case(
        "ties, density 0.4",
        differences("ties", 0.7, density=0.4),
        "ties",
        weighted(WEIGHTS, density=0.4),
        "seed",
        {"normalize": True, "lambda": 0.7},
    ),
    Case(
        "ties, density 1",
        differences("ties", density=1.0),
        "ties",
        weighted(WEIGHTS, density=1.0),
        "seed",
        {"normalize": True, "lambda": 1.0},
    ),
    Case(
        "dare_ties, density 1",
        differences("dare_ties", 0.7, density=1.0),
        "dare_ties",
        weighted(WEIGHTS, density=1.0),
        "seed",
        {"normalize": True, "rescale": False, "lambda": 0.7},
    ),
    Case("model_stock", {"make": "model_stock", "base": "seed"}, "model_stock", PLAIN, "seed"),
    Case(
        "model_stock of two, with a negative share",
        {"make": "model_stock", "base": "seed"},
        "model_stock",
        {"code": {}, "opposed": {}},
        "seed",
    ),
    Case("sce, density 0.4", differing("sce", density=0.4), "sce", PLAIN, "seed", {"select_topk": 0.4}),
    Case("sce, density 1", differing("sce", density=1.0), "sce", PLAIN, "seed"),
    Case("ram", differing("ram", epsilon=0.05), "ram", PLAIN, "seed", {"epsilon": 0.05}),
    Case("ram as it is by default", differing("ram"), "ram", PLAIN, "seed"),
    Case(
        "breadcrumbs",
        differences("breadcrumbs", 0.7, density=0.5, gamma=0.05),
        "breadcrumbs",
        weighted(WEIGHTS, density=0.5, gamma=0.05),
        "seed",
        {"lambda": 0.7},
    ),
    Case(
        "breadcrumbs with more outliers than there is room for",
        differences("breadcrumbs", density=0.9, gamma=0.3),
        "breadcrumbs",
        weighted(WEIGHTS, density=0.9, gamma=0.3),
        "seed",
    ),
    Case("dare_linear, density 1", differences("dare_linear", 0.7, density=1.0), "dare_linear", weighted(WEIGHTS), "seed", {"lambda": 0.7}),
    Case(
        "della, density 1", differences("della", 0.7, density=1.0), "della", weighted(WEIGHTS), "seed", {"normalize": True, "lambda": 0.7}
    ),
    Case("karcher", {"make": "karcher"}, "karcher", PLAIN, options={"max_iter": 100, "tol": 1e-7}),
    Case("karcher of two", {"make": "karcher"}, "karcher", {"code": {}, "law": {}}, options={"max_iter": 100, "tol": 1e-7}),
    Case("nuslerp", {"make": "nuslerp", "from": ["code", "law"], "t": 0.3}, "nuslerp", weighted({"code": 0.7, "law": 0.3})),
    Case(
        "nuslerp by rows",
        {"make": "nuslerp", "from": ["code", "law"], "t": 0.3, "by": "rows"},
        "nuslerp",
        weighted({"code": 0.7, "law": 0.3}),
        options={"nuslerp_flatten": False},
    ),
]

CONVERTED = [
    Case("linear, converted", {}, "linear", weighted({"seed": 3.0, "code": 1.0, "law": 0.5})),
    Case(
        "slerp by filters and layers, converted",
        {},
        "slerp",
        {"seed": {}, "code": {}},
        "seed",
        {"t": [{"filter": "self_attn", "value": [0, 0.3, 1]}, {"filter": "mlp", "value": [0.8, 0.2]}, {"value": 0.5}]},
    ),
    Case(
        "ties by filters and layers, converted",
        {},
        "ties",
        {
            "code": {"weight": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 1.0}], "density": 0.4},
            "law": {"weight": 0.6, "density": 0.4},
        },
        "seed",
        {"lambda": 0.7, "int8_mask": True},
    ),
    Case("task_arithmetic, normalised, converted", {}, "task_arithmetic", weighted(WEIGHTS), "seed", {"normalize": True}),
    Case("a gradient over everything, converted", {}, "slerp", {"seed": {}, "code": {}}, "seed", {"t": [0.1, 0.9]}),
    Case("model_stock, converted", {}, "model_stock", PLAIN, "seed"),
    Case("sce, converted", {}, "sce", PLAIN, "seed", {"select_topk": 0.3}),
    Case("ram, converted", {}, "ram", PLAIN, "seed", {"epsilon": 0.05}),
    Case("breadcrumbs, converted", {}, "breadcrumbs", weighted(WEIGHTS, density=0.6, gamma=0.1), "seed", {"lambda": 0.7}),
    Case("dare_linear, density 1, converted", {}, "dare_linear", weighted(WEIGHTS, density=1.0), "seed"),
    Case("della, density 1, converted", {}, "della", weighted(WEIGHTS, density=1.0), "seed", {"normalize": True}),
    Case("karcher, converted", {}, "karcher", PLAIN, options={"max_iter": 100, "tol": 1e-7}),
    Case("nuslerp, converted", {}, "nuslerp", weighted({"code": 0.7, "law": 0.3})),
    Case("nuslerp by rows, converted", {}, "nuslerp", weighted({"code": 1.0, "law": 3.0}), options={"nuslerp_flatten": False}),
]

APART = [
    Case(
        "slerp at a narrow angle",
        {"make": "slerp", "from": ["seed", "near"], "t": 0.3},
        "slerp",
        {"seed": {}, "near": {}},
        "seed",
        {"t": 0.3},
        differs="above a cosine of 0.9995 mergekit takes the straight line",
    ),
    Case(
        "ties with zero sums",
        {"make": "ties", "base": "grid_seed", "density": 1.0},
        "ties",
        weighted({"grid_code": 1.0, "grid_mirror": 1.0}, density=1.0),
        "grid_seed",
        {"normalize": True},
        differs="mergekit elects plus where the sum is zero, we elect no sign",
    ),
    Case(
        "ties with equal magnitudes",
        {"make": "ties", "base": "coarse_seed", "density": 0.5},
        "ties",
        weighted({"coarse_code": 1.0}, density=0.5),
        "coarse_seed",
        {"normalize": True},
        differs="mergekit keeps exactly k entries, we keep all that equal the k-th",
    ),
    Case(
        "ties with weights that cancel",
        {"make": "ties", "base": "seed", "density": 1.0, "weights": {"code": 0.5, "law": -0.5}},
        "ties",
        weighted({"code": 0.5, "law": -0.5}, density=1.0),
        "seed",
        {"normalize": True},
        differs="mergekit divides by the sum of the weights, signs and all, we by that of their magnitudes",
    ),
    Case(
        "dare_ties as mergekit has it by default",
        differences("dare_ties", density=1.0),
        "dare_ties",
        weighted(WEIGHTS, density=1.0),
        "seed",
        differs="mergekit sums the agreeing differences unless normalize is set",
    ),
    Case(
        "sce of small differences",
        {"make": "sce", "base": "seed", "density": 1.0},
        "sce",
        {"near": {}, "nearer": {}},
        "seed",
        differs="where the mean squares sum to less than 1e-6 mergekit weighs all models alike, we by their squares however small",
    ),
    Case(
        "model_stock of small differences",
        {"make": "model_stock", "base": "seed"},
        "model_stock",
        {"tiny": {}, "tinier": {}},
        "seed",
        differs="mergekit takes products of lengths below 1e-6 for 1e-6, we take the cosine of any two that are not 0",
    ),
    Case(
        "karcher as it is by default",
        {"make": "karcher"},
        "karcher",
        {"seed": {}, "mirror": {}},
        options={},
        differs="of opposite directions, which have no mean, mergekit takes the first, we the mean of the tensors",
    ),
    Case(
        "breadcrumbs with equal magnitudes",
        {"make": "breadcrumbs", "base": "coarse_seed", "density": 0.5, "gamma": 0.1},
        "breadcrumbs",
        weighted({"coarse_code": 1.0}, density=0.5, gamma=0.1),
        "coarse_seed",
        differs="mergekit keeps exactly k entries, we keep all that equal those at either end",
    ),
    Case(
        "sce with zero sums",
        {"make": "sce", "base": "grid_seed", "density": 1.0},
        "sce",
        {"grid_code": {}, "grid_mirror": {}},
        "grid_seed",
        differs="mergekit elects plus where the sum is zero, we elect no sign",
    ),
]


# ---- merging and comparing -------------------------------------------------------------------------------------------------


def merge_both(case: Case, index: int, work: Path, mergekit: Path) -> tuple[Tensors, Tensors]:
    """The tensors that bam-merge and mergekit make for `case`."""
    ours, theirs = work / f"ours{index}", work / f"theirs{index}"
    recipe = write_recipe(work / f"ours{index}.yaml", case.ours(str(work / "models"), ours.name))
    run([bam_merge(), "merge", recipe])
    config = write_recipe(work / f"theirs{index}.yaml", case.theirs(work / "models"))
    run([mergekit / "mergekit-yaml", config, theirs, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"])
    return read_folder(ours), read_folder(theirs)


def read_folder(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def largest_difference(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    """The largest difference of two elements as a share of the tensor's largest magnitude, and that tensor's name."""
    if {name: (array.dtype, array.shape) for name, array in ours.items()} != {name: (a.dtype, a.shape) for name, a in theirs.items()}:
        raise SystemExit("the two merges have different tensors, shapes or dtypes.")
    worst, where = 0.0, ""
    for name, array in ours.items():
        difference = float(numpy.abs(array.astype("f8") - theirs[name].astype("f8")).max())
        share = difference / float(numpy.abs(theirs[name]).max())
        if not share <= worst:  # so that NaN is the worst of all
            worst, where = share, name
    return worst, where


def compare(cases: Sequence[Case], work: Path, mergekit: Path) -> bool:
    """Merge every case with both tools and print the table. Returns whether all came out as their cases say."""
    rows, right = [], True
    for index, case in enumerate(cases):
        ours, theirs = merge_both(case, index, work, mergekit)
        worst, where = largest_difference(ours, theirs)
        identical = sum(bool(numpy.array_equal(array, theirs[name])) for name, array in ours.items())
        as_said = (worst <= TOLERANCE) != bool(case.differs)
        right &= as_said
        verdict = ("as defined: " + case.differs if case.differs else "same") if as_said else "WRONG"
        rows.append([case.name, f"{worst:.1e}", where, f"{identical} of {len(ours)}", verdict])
    print(
        markdown_table(
            ["method", "largest difference / largest magnitude", "in tensor", "identical tensors", "verdict"], rows, left=(0, 2, 4)
        )
    )
    return right


def mergekit_version(mergekit: Path) -> str:
    """The version that the Python beside mergekit-yaml has installed."""
    return run([mergekit / "python", "-c", "from importlib.metadata import version; print(version('mergekit'))"]).output.strip()


def main() -> int:
    """Returns the exit status of the module's docstring."""
    parser = argparse.ArgumentParser(description="Compare the merge methods of bam-merge with mergekit's.")
    parser.add_argument("--mergekit", type=Path, required=True, metavar="DIR", help="the bin folder in which mergekit 0.1.5 is")
    mergekit: Path = parser.parse_args().mergekit
    if not (mergekit / "mergekit-yaml").exists():
        parser.error(f"{mergekit} holds no mergekit-yaml.")
    print(f"{machine_line(machine())}; mergekit {mergekit_version(mergekit)}, {VERSION} is what the cases are about\n")
    with tempfile.TemporaryDirectory(prefix="mergekit-parity-", dir=".") as folder:
        work = Path(folder).resolve()  # mergekit's paths do not start from its configuration file
        write_models(work / "models")
        return 0 if compare([*ALIKE, *CONVERTED, *APART], work, mergekit) else 1


if __name__ == "__main__":
    sys.exit(main())
