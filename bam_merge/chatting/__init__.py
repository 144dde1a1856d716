"""Talking with a model: its chat template, what computes it, and the conversation."""
