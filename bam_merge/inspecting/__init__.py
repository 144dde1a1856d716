"""One model: what is in it, what it costs, statistics of its values."""
