"""Expressions: how one output tensor is made from source tensors. Frozen, plain data, no torch.

An expression is a shallow tree: Read or Computed, maybe Slice, maybe Merge, maybe Concat; or Init, or Calibrated. Its `str` is what
plans and manifests show. The tree is in tree.py, the records of merge methods, initialisers and calibrators beside it, by kind: what
stands in one of these files is `expressions.NAME`. The arithmetic that carries them out is in merging/kernels/, one function per method
record.
"""

from bam_merge.expressions.calibrators import *
from bam_merge.expressions.experts import *
from bam_merge.expressions.initialisers import *
from bam_merge.expressions.means import *
from bam_merge.expressions.spheres import *
from bam_merge.expressions.task_vectors import *
from bam_merge.expressions.tree import *
from bam_merge.records import Calibrator as Calibrator
from bam_merge.records import Formula as Formula
from bam_merge.records import Initialiser as Initialiser
from bam_merge.records import Method as Method
