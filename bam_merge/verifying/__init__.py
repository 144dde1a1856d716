"""Prove: the result against its sources, by other ways than it was made."""
