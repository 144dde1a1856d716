"""A second, slow way to the same tensors: whole blocks of rows in float64, read with the safetensors library. One function per record.

verify compares what a merge wrote with this. Nothing that carries out a plan is imported: reading, cutting, thresholds, arithmetic,
elections (election.py) and rounding (rounding.py) are written a second time, from the formulas of expressions' records, and where
a function here does what one of the merge does, that is its purpose: a mistake must be made twice to pass. A contract of import-linter
holds it. What both have is what a plan says, not how it is carried out:

* the plan, its expressions and stored pieces as records; `in_float64`, which says what a merge is computed in, and `proportion`, which
  says by which whole weights an election is held;
* the generator of values/streams.py: a plan names a draw by seed and stream, and only the generator itself turns these into numbers. Its
  own tests have a second one;
* how many bits a dtype has (checkpoints/dtypes.py), which its tests compare with torch.
"""

from bam_merge.verifying.rederive import experts as experts
from bam_merge.verifying.rederive import initialisers as initialisers
from bam_merge.verifying.rederive import means as means
from bam_merge.verifying.rederive import spheres as spheres
from bam_merge.verifying.rederive import task_vectors as task_vectors
from bam_merge.verifying.rederive.deriving import Written as Written
from bam_merge.verifying.rederive.deriving import derive as derive
from bam_merge.verifying.rederive.deriving import draw as draw
from bam_merge.verifying.rederive.deriving import overall as overall
from bam_merge.verifying.rederive.deriving import survey_anew as survey_anew
from bam_merge.verifying.rederive.tree import rederive as rederive
from bam_merge.verifying.rederive.tree import survey_all as survey_all
