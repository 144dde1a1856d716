"""Makes: the ways in which a recipe can ask for a tensor to be made. A class that stands in a file here is offered by every recipe."""

from bam_merge.recipe.makes.data_routers import *
from bam_merge.recipe.makes.experts import *
from bam_merge.recipe.makes.initialisers import *
from bam_merge.recipe.makes.kinds import *
from bam_merge.recipe.makes.means import *
from bam_merge.recipe.makes.spheres import *
from bam_merge.recipe.makes.task_vectors import *
