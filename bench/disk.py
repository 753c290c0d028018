"""loads from disk against plain file reads, and how fast 100,000 chunks come back."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout."""
    del options
    return 1
