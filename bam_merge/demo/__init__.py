"""Four small checkpoints, merged and run."""
