"""The server: protocol and store joined, on an event loop.

``server`` is a ``host`` of connections that listens; ``supervisor`` listens for several processes, each of which is a
``worker``. ``accept`` accepts; ``connection`` is one client's handshake; ``session`` is the hot path of its
transmission, with ``reading`` for what it reads, for which ``input`` receives and ``output`` sends; ``export`` orders
the changes and flushes of a clone; ``offload`` has the threads.
"""
