"""A finished folder in another form, for an engine that does not read it as it is; each checked by reading it back."""
