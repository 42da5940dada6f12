"""Settings: names and units, environment variables, changed copies."""

from collections import Counter

import pytest
from pydantic import ValidationError

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
from tools.settings_page import PAGE, settings_page

WHOLE: list[type[Settings]] = [ServerSettings, ClientSettings]
GROUPS: list[type[SettingsGroup]] = [
    ApiSettings,
    NetSettings,
    StoreSettings,
    WeightsSettings,
    *(type(group) for settings in WHOLE for _, group in settings()),
]


def variables(group: type[SettingsGroup]) -> list[str]:
    return [f"{group.model_config['env_prefix']}{name}".upper() for name in group.model_fields]


def test_every_field_has_an_environment_variable_of_its_own() -> None:
    counts = Counter(variable for group in GROUPS for variable in variables(group))
    assert [variable for variable, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_durations_end_in_s_and_fields_have_whole_sentences_as_descriptions(
    group: type[SettingsGroup],
) -> None:
    for name, field in group.model_fields.items():
        described = field.description or ""
        assert described[:1].isupper(), name
        assert described.endswith((".", ".)")), name
        if "timeout" in name or "period" in name or "lifetime" in name:
            assert name.endswith("_s")


def test_a_field_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_SERVER_CACHE_BYTES", "4096")
    monkeypatch.setenv("SWARMKIT_SERVER_IDLE_TIMEOUT_S", "7.5")
    monkeypatch.setenv("SWARMKIT_CLIENT_CODECS", '["int8"]')
    server, client = ServerSettings(), ClientSettings()
    assert (server.limits.cache_bytes, server.requests.idle_timeout_s) == (4096, 7.5)
    assert client.transfer.codecs == ("int8",)


def test_a_changed_copy_differs_in_the_named_fields_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_SERVER_MAX_SESSIONS", "3")
    before = ServerSettings()
    after = before.replace(idle_timeout_s=5, cache_bytes=100)
    assert after.requests == before.requests.model_copy(update={"idle_timeout_s": 5.0})
    assert (after.limits.cache_bytes, after.limits.max_sessions) == (100, 3)
    assert after.engine is before.engine


def test_a_changed_copy_refuses_unknown_names_and_values_that_are_not_allowed() -> None:
    with pytest.raises(TypeError, match="ServerSettings has no field named color"):
        ServerSettings().replace(color="blue")
    with pytest.raises(ValidationError, match="max_sessions"):
        ServerSettings().replace(max_sessions=0)


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings().replace(codecs=(), prefix_cache="everyone", upload_bytes_per_s=1e6, push=False),
        ClientSettings().replace(codecs=("int8",), compress="always", precisions=("nf4",), step_deadline_s=2),
    ],
    ids=["server", "client"],
)
def test_another_process_reads_the_same_settings_from_their_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert type(settings)() == settings


def test_the_page_of_settings_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `make settings`"
