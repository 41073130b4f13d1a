"""Machines that are network namespaces of this one, each with an address and a cable that can be cut."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache

NETWORK = "10.77.0."


@cache
def unavailable():
    """Why there can be none here, or None."""
    if not shutil.which("ip"):
        return "the command ip, of iproute2, is not installed"
    try:
        with machines(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()}"


class Machine:
    """One of them."""

    def __init__(self, number):
        self.name, self.address = f"moco{os.getpid()}-{number}", f"{NETWORK}{number + 1}"

    def start(self, command, **environment):
        """A program on it, in a group of processes of its own."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"} | environment,
        )  # fmt: skip

    def cut_off(self):
        """Nothing leaves or reaches it any more, and no connection is closed."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


@contextmanager
def machines(count):
    """So many, on one switch."""
    made, switch = [Machine(i) for i in range(count)], f"moco{os.getpid()}-switch"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, machine in enumerate(made):
            _ip("netns", "add", machine.name)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            _ip("link", "add", "eth0", "netns", machine.name, "type", "veth",
                "peer", "name", f"port{i}", "netns", switch)  # fmt: skip
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
        yield made
    finally:
        for name in (switch, *(machine.name for machine in made)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
