"""Appear: staging, companions, manifest, and the rename that makes the result visible."""
