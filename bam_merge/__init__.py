"""bam-merge: build mixture-of-experts checkpoints (BAM, BTX, Sparse Upcycling) out of dense ones, and prove them right."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bam_merge._version import __version__

if TYPE_CHECKING:
    from bam_merge.comparing.branches import drift
    from bam_merge.comparing.drift import Drift, Reading
    from bam_merge.comparing.findings import Finding
    from bam_merge.comparing.tensor_difference import Difference
    from bam_merge.comparing.two_models import Comparison, diff
    from bam_merge.errors import (
        BamMergeError,
        CheckpointError,
        DurabilityUncertain,
        NonFiniteError,
        OutputError,
        RecipeError,
        SyncFailed,
        VerificationFailed,
        VerifyError,
    )
    from bam_merge.inspecting.inspection import Inspection, inspect
    from bam_merge.model.loading import load_model
    from bam_merge.model.model import Model
    from bam_merge.planning.make import make_plan
    from bam_merge.planning.plan import Plan, Step
    from bam_merge.publishing.anew import calibrate
    from bam_merge.publishing.extract import extract
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.publishing.publish import merge
    from bam_merge.publishing.push import Pushed, push
    from bam_merge.publishing.refresh import refresh
    from bam_merge.recipe.load import load_recipe
    from bam_merge.recipe.schema import Recipe
    from bam_merge.routing.route import RoutedText, RouteOptions, Routes, route
    from bam_merge.verifying.options import VerifyOptions
    from bam_merge.verifying.report import Check, Report
    from bam_merge.verifying.verification import verify

_HOMES = {
    "comparing.branches": ("drift",),
    "comparing.drift": (
        "Drift",
        "Reading",
    ),
    "comparing.findings": ("Finding",),
    "comparing.tensor_difference": ("Difference",),
    "comparing.two_models": (
        "Comparison",
        "diff",
    ),
    "errors": (
        "BamMergeError",
        "CheckpointError",
        "DurabilityUncertain",
        "NonFiniteError",
        "OutputError",
        "RecipeError",
        "SyncFailed",
        "VerificationFailed",
        "VerifyError",
    ),
    "inspecting.inspection": (
        "Inspection",
        "inspect",
    ),
    "model.loading": ("load_model",),
    "model.model": ("Model",),
    "planning.make": ("make_plan",),
    "planning.plan": (
        "Plan",
        "Step",
    ),
    "publishing.anew": ("calibrate",),
    "publishing.extract": ("extract",),
    "publishing.options": ("MergeOptions",),
    "publishing.publish": ("merge",),
    "publishing.push": (
        "Pushed",
        "push",
    ),
    "publishing.refresh": ("refresh",),
    "recipe.load": ("load_recipe",),
    "recipe.schema": ("Recipe",),
    "routing.route": (
        "RouteOptions",
        "RoutedText",
        "Routes",
        "route",
    ),
    "verifying.report": (
        "Check",
        "Report",
    ),
    "verifying.options": ("VerifyOptions",),
    "verifying.verification": ("verify",),
}
"""The modules of the public names. docs/reference/python.md lists them."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BamMergeError",
    "Check",
    "CheckpointError",
    "Comparison",
    "Difference",
    "Drift",
    "DurabilityUncertain",
    "Finding",
    "Inspection",
    "MergeOptions",
    "Model",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "Pushed",
    "Reading",
    "Recipe",
    "RecipeError",
    "Report",
    "RouteOptions",
    "RoutedText",
    "Routes",
    "Step",
    "SyncFailed",
    "VerificationFailed",
    "VerifyError",
    "VerifyOptions",
    "__version__",
    "calibrate",
    "diff",
    "drift",
    "extract",
    "inspect",
    "load_model",
    "load_recipe",
    "make_plan",
    "merge",
    "push",
    "refresh",
    "route",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import bam_merge` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bam_merge' has no attribute {name!r}")
    return getattr(import_module(f"bam_merge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
