"""The mathematics of merging, one small pure function per method.

Tensors come as chunks of flat vectors in one floating dtype (float32, or float64 where a source is) and leave in it; nothing here
casts, rounds or touches files. Methods that need to know a whole tensor first (a threshold, an angle) get it from `survey`, which
reads the chunks once or twice; `combine` then works on any chunk by itself.

Shapes: x_C is a chunk of C elements; a chunk list x_KC has one per operand; d_C = x_C - base_C is a task vector's chunk.
"""

from bam_merge.merging.kernels import experts as experts
from bam_merge.merging.kernels import means as means
from bam_merge.merging.kernels import spheres as spheres
from bam_merge.merging.kernels import task_vectors as task_vectors
from bam_merge.merging.kernels.chunks import Chunk as Chunk
from bam_merge.merging.kernels.chunks import Chunks as Chunks
from bam_merge.merging.kernels.chunks import combine as combine
from bam_merge.merging.kernels.chunks import survey as survey
