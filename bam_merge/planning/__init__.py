"""Decide all: from a recipe and headers to every output tensor, its expression and its place."""
