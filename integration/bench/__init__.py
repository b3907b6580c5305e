"""The benchmark: ``python -m integration.bench`` measures nbdclone beside the servers that people use for the same.

What stands where:

- ``workloads``, ``goals``: what is asked of the servers, and what is to come out of it;
- ``peer``, ``peers``, ``floors``, ``raw_server.c``: how each server is run;
- ``rounds``, ``measure``, ``guests``: the turns, one of them with a load, one of them with a machine;
- ``drivers``, ``processes``: the programs that load a server, and what it takes meanwhile;
- ``cost``: what clones cost, in time, disk and memory; ``machine``: where it was measured;
- ``results``, ``report``, ``chart``, ``page``: figures, tables, the picture, and the page in docs.
"""
