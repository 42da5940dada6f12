"""Which announced addresses are dialled at a client's word."""

from __future__ import annotations

import pytest

from swarmkit.net.transport.dialling import may_dial

LOOPBACK = "/ip4/127.0.0.1/tcp/4001"
HOME = "/ip4/192.168.0.7/tcp/4001"
INTERNET = "/ip4/8.8.8.8/tcp/4001"
INTERNET_6 = "/ip6/2606:4700::1111/tcp/4001"


@pytest.mark.parametrize(
    ("own", "address", "allowed"),
    [
        ([INTERNET], INTERNET, True),
        ([INTERNET], INTERNET_6, True),
        ([HOME], INTERNET, True),
        ([], INTERNET, True),
        # the server's own network
        ([INTERNET], "/ip4/10.0.0.1/tcp/22", False),
        ([INTERNET], HOME, False),
        ([INTERNET], "/ip4/169.254.169.254/tcp/80", False),
        ([INTERNET], "/ip6/fe80::1/tcp/80", False),
        ([INTERNET], "/ip6/::ffff:192.168.0.1/tcp/80", False),
        ([HOME], "/ip4/192.168.1.9/tcp/4001", True),
        ([HOME], "/ip4/10.0.0.1/tcp/4001", False),
        # this machine
        ([LOOPBACK], LOOPBACK, True),
        ([LOOPBACK, HOME], LOOPBACK, True),
        ([LOOPBACK, INTERNET], LOOPBACK, False),
        ([HOME], LOOPBACK, False),
        ([INTERNET], "/ip4/127.8.8.8/tcp/22", False),
        ([INTERNET], "/ip6/::1/tcp/22", False),
        ([LOOPBACK], "/ip4/0.0.0.0/tcp/22", False),
        # names, and what is no address
        ([INTERNET], "/dns4/router.example/tcp/80", False),
        (["/dns4/server.example/tcp/80"], "/dns4/router.example/tcp/80", False),
        ([INTERNET], "/unix/var/run/socket", False),
        ([INTERNET], "/ip4/8.8.8/tcp/80", False),
        ([INTERNET], "", False),
        (["/memory/a/p2p/a"], "/memory/b/p2p/b", True),
    ],
)
def test_an_address_is_dialled_where_the_server_itself_is_reached_in_such_a_way(
    own: list[str], address: str, allowed: bool
) -> None:
    assert may_dial([address], own) == ((address,) if allowed else ())
