"""This build's version, for the wire and the command line."""

__version__ = "0.1.0"
