"""The server: protocol and store joined, on an event loop.

``server`` listens and accepts; ``connection`` is one client's handshake; ``session`` is the hot path of its
transmission, for which ``input`` receives and ``output`` sends; ``export`` orders the changes and flushes of a clone;
``offload`` has the threads.
"""
