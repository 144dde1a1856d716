"""Stored bytes as numbers: numpy and torch, seeded randomness, threads."""
