"""What is on disk: safetensors headers, folders, stored pieces, reading, and where a merge's tensors came from."""
