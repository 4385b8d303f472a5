"""Ports for servers that tests start."""

import random
import socket


def free_port() -> int:
    """A port of this machine at which nothing listens, of those that the system hands to nobody else before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError("no port from 20000 to 31999 is free")
