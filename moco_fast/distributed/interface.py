"""The network interface of gloo's connections, where its own choice reaches no other machine.

gloo listens where the name of its machine leads, and Debian's ``/etc/hosts`` has that lead to 127.0.1.1. NCCL
looks for an interface itself: a script that runs over several machines with NCCL must not fail for what ranks
say to each other over gloo.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "GLOO_SOCKET_IFNAME"
ANYWHERE = "192.0.2.1"  # in no network (RFC 5737): what leads there is the default route
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@contextmanager
def reachable_interface() -> Iterator[None]:
    """Make groups in the block where other machines reach them, unless gloo was told or sees to it itself."""
    name = None if os.environ.get(VARIABLE) else _interface()
    if name is None:
        yield
        return
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def _interface() -> str | None:
    """One by which this machine reaches rank 0, or else anything; None where gloo's choice is right."""
    alone = os.environ.get("LOCAL_WORLD_SIZE", "0") == os.environ.get("WORLD_SIZE")
    if alone or not _is_loopback(_address_of(socket.gethostname())):
        return None
    for host in (os.environ.get("MASTER_ADDR"), ANYWHERE):
        own = _address_towards(host) if host else None
        if own is not None and not _is_loopback(own):
            return next((name for _, name in socket.if_nameindex() if _address_at(name) == own), None)
    return None


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.")


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _address_towards(host: str) -> str | None:
    """The address of this machine that a packet to a host would carry; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _address_at(interface: str) -> str | None:
    """The IPv4 address of an interface; None if it has none, or on a system other than Linux."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except (ImportError, OSError):
        return None
    return socket.inet_ntoa(found[20:24])
