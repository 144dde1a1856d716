"""Folders of pickled weights to folders of safetensors: read in a process that may do nothing but read, published as merges are."""
