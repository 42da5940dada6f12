"""The tray: a small program in the person's own session, which never imports torch.

It senses whether the person uses the computer, and lends that to the worker for a few seconds at a time
(`watch.py`). It shows the worker's state as an icon with a menu (`face.py` decides what, `icons.py` draws it,
and a *host* puts it on the desktop), and serves the pages with settings, contributions and first steps
(`pages.py`) to this person's browser alone.

Hosts: `status_notifier.py` speaks the protocol of Linux desktops over D-Bus; `pystray_host.py` is for Windows
and macOS, and for Linux where the distribution's AppIndicator is at hand.
"""
