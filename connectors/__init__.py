"""One file or folder per engine; each knows only the client."""
