"""The transport for the Internet: libp2p through hivemind's daemon, and direct streams beside it."""
