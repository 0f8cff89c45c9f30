"""A server's address, and the server itself."""

import socket

import uvicorn
from fastapi import FastAPI

LEAVE_SECONDS = 5  # for answers that are being written when the server is told to end


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, and that nobody can connect to yet. port: 0 takes a free one.

    Raises ValueError where the address cannot be had, which is known before a model is loaded.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"the server cannot have {host} port {port} ({error}); give another --host or --port"
        ) from error
    return listener


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LEAVE_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])
