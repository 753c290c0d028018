"""How a chunk is encoded on disk: one codec a file, each with a stable id."""
