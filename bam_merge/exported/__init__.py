"""The model code that travels with a bam checkpoint. It imports nothing of ours."""
