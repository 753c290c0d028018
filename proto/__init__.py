"""The wire contract `kvtier.v1` and its generated stubs."""
