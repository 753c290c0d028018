"""replay a trace of requests: what a policy serves at which capacity, beside LRU and the optimum.

The trace goes through the real index and policy, without bytes.
"""

from kvtier.bench.trace.run import add_arguments, run

__all__ = ["add_arguments", "run"]
