"""Where chunks live: arena, memory tier, LMDB tier, index, eviction policies."""
