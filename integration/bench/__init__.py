"""The benchmark: ``python -m integration.bench`` measures nbdclone beside the servers that people use for the same.

What stands where: ``peers`` (how each server is run), ``workloads`` (what is asked of it, and the goals), ``measure``
(one run of the load driver to numbers), ``cost`` (what clones cost, in time, disk and memory), ``machine`` (where it
was measured), ``report`` (tables and JSON), ``__main__`` (the turns and rounds).
"""
