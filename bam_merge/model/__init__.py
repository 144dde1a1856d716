"""The reference model: every dense family, bam and the public mixtures, one block at a time."""
