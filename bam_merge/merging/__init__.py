"""Carry out: expressions to bytes, streamed by workers."""
