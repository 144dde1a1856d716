"""bam-merge: build mixture-of-experts checkpoints (BAM, BTX, Sparse Upcycling) out of dense ones, and prove them right."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bam_merge.comparison import diff
    from bam_merge.errors import BamMergeError
    from bam_merge.inspection import inspect
    from bam_merge.loading import load_model
    from bam_merge.plan import Plan, make_plan
    from bam_merge.publish import MergeOptions, merge
    from bam_merge.recipe import Recipe, load_recipe
    from bam_merge.verification import verify

_HOMES = {
    "BamMergeError": "errors", "load_recipe": "recipe", "Recipe": "recipe", "make_plan": "plan", "Plan": "plan",
    "merge": "publish", "MergeOptions": "publish", "verify": "verification", "load_model": "loading",
    "inspect": "inspection", "diff": "comparison",
}  # fmt: skip

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
