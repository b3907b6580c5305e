"""The NBD protocol: bytes in, messages out. Nothing in here touches a socket, a file or a clock.

``wire`` has the numbers and the layouts; ``handshake`` the option haggling of a server, ``client_handshake``
that of a client; ``requests`` what a server takes from the wire, ``transmission`` what it makes of it and all of a
client's side, ``pending`` what a client waits for;
``block_status`` metadata contexts.
"""
