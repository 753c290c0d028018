"""The benchmark CLI: scenarios, peers, plots."""
