"""Which chunk goes first: one eviction policy a file."""
