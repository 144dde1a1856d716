"""bam-merge: build mixture-of-experts checkpoints (BAM, BTX, Sparse Upcycling) out of dense ones, and prove them right."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bam_merge._version import __version__

if TYPE_CHECKING:
    from bam_merge.comparing.two_models import diff
    from bam_merge.errors import BamMergeError
    from bam_merge.inspecting.inspection import inspect
    from bam_merge.model.loading import load_model
    from bam_merge.planning.make import make_plan
    from bam_merge.planning.plan import Plan
    from bam_merge.publishing.options import MergeOptions
    from bam_merge.publishing.publish import merge
    from bam_merge.recipe.load import load_recipe
    from bam_merge.recipe.schema import Recipe
    from bam_merge.verifying.verification import verify

_HOMES = {
    "BamMergeError": "errors",
    "MergeOptions": "publishing.options",
    "Plan": "planning.plan",
    "Recipe": "recipe.schema",
    "diff": "comparing.two_models",
    "inspect": "inspecting.inspection",
    "load_model": "model.loading",
    "load_recipe": "recipe.load",
    "make_plan": "planning.make",
    "merge": "publishing.publish",
    "verify": "verifying.verification",
}

__all__ = [
    "BamMergeError",
    "MergeOptions",
    "Plan",
    "Recipe",
    "__version__",
    "diff",
    "inspect",
    "load_model",
    "load_recipe",
    "make_plan",
    "merge",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import bam_merge` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bam_merge' has no attribute {name!r}")
    return getattr(import_module(f"bam_merge.{_HOMES[name]}"), name)
