"""Tokenizers: read in every form, compared in every pair, aligned by token, and written."""
