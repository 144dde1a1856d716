"""What goes in: dense checkpoints, opened and found to agree."""
