"""Low-rank updates (PEFT's LoRA) of a source: what their configuration asks for, and which tensors they change."""
