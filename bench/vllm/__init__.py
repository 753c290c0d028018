"""A real vLLM server, cold and warm: what its prompts cost, and that its answers stay the same."""
