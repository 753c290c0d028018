"""The demo: a small real model, cold and warm, with its transcript and plot."""
