"""The listening socket, had before libraries and a model are loaded for nothing: imports nothing slow."""

import ipaddress
import socket

from runtime.errors import ConfigError


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A listening socket; who connects already waits until the server answers.

    Raises:
        ConfigError: the address cannot be had, or is public and there is no key.
    """
    if not (has_key or is_local(host)):
        raise ConfigError(f"{host} can be reached from other machines: set an API key, or bind 127.0.0.1")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"{host} port {port} cannot be bound: {error.strerror or error}") from None


def is_local(host: str) -> bool:
    """Whether a host, without its port, is a name of this machine that means it everywhere."""
    name = host.lower().removesuffix(".")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def url_of(listener: socket.socket) -> str:
    """The address that a socket listens at."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
