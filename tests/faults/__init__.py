"""Faults: whatever kills, starves or lies to a merge, its target is absent or complete, and the next run ends in the same bytes."""
