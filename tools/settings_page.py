"""Write docs/settings.md from the settings' own names, defaults and descriptions."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from swarmkit.models.checkpoint.store import StoreSettings
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.settings import (
    ApiSettings,
    ClientSettings,
    NetSettings,
    ServerSettings,
    Settings,
    SettingsGroup,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

_OPENING = """\
# Settings

This page is written from the code by `make settings`; `tests/test_settings.py` checks that it is up to date.

Each setting is an environment variable, read when a command or a program starts. Lists are written in JSON,
as in `SWARMKIT_CLIENT_CODECS='["int8"]'`. A program can also change settings by name, whichever group they
are in:

```python
from swarmkit.settings import ClientSettings, ServerSettings

settings = ServerSettings().replace(max_sessions=8, cache_bytes=512 * 1024**2)
patient = ClientSettings().replace(min_step_timeout_s=60)
```

Durations (`_S`) are in seconds, amounts of memory (`_BYTES`) in bytes, rates (`_BYTES_PER_S`) in bytes per
second.
"""


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    parts = [_OPENING]
    for title, settings, package in (
        ("Server", ServerSettings, "swarmkit.settings.ServerSettings"),
        ("Client", ClientSettings, "swarmkit.settings.ClientSettings"),
    ):
        parts.append(f"## {title}\n\n{_doc(settings)} In Python: `{package}`.\n")
        for name, field in settings.model_fields.items():
            group = field.annotation
            assert isinstance(group, type)
            assert issubclass(group, SettingsGroup)
            parts.append(f"### `{name}`: {_doc(group)}\n\n{_table(group)}")
    for title, group in (
        ("HTTP API", ApiSettings),
        ("Network", NetSettings),
        ("Weights", WeightsSettings),
        ("Store", StoreSettings),
    ):
        parts.append(f"## {title}\n\n{_doc(group)}\n\n{_table(group)}")
    return "\n".join(parts)


def _doc(settings: type[Settings | SettingsGroup]) -> str:
    return " ".join((settings.__doc__ or "").split())


def _table(group: type[SettingsGroup]) -> str:
    lines = ["| Variable | Default | Meaning |", "| --- | --- | --- |"]
    for name, field in group.model_fields.items():
        variable = f"{group.model_config['env_prefix']}{name}".upper()
        described = f"{field.description}{_choices(field)}".replace("|", "\\|")
        lines.append(f"| `{variable}` | {_default(field)} | {described} |")
    return "\n".join(lines) + "\n"


def _choices(field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is not Literal:
        return ""
    return f" Choices: {', '.join(f'`{choice}`' for choice in typing.get_args(field.annotation))}."


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    return f"{value:,.15g}" if isinstance(value, int | float) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
