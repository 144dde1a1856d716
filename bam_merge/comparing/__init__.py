"""Several models: what differs, what was done, how far branches drifted."""
