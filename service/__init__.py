"""The process: cache (decisions), placement, sessions and leases, servicers, admin."""
