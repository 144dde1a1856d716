"""Folders of models elsewhere, by their addresses: what is asked of the stores they are in, and what is said when that fails."""
