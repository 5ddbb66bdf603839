from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict
from redis.asyncio.connection import parse_url

from services.common.settings import ServerSettings, with_password
from shelora.errors import DomainError, Reason


class BakerySettings(ServerSettings):
    model_config = SettingsConfigDict(env_prefix="SHELORA_BAKERY_")

    flour_kg: float


def refused(**flags):
    with pytest.raises(DomainError) as caught:
        BakerySettings.load(**flags)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    return caught.value.message


def test_the_environment_is_read_with_the_prefix_of_the_service(monkeypatch):
    monkeypatch.setenv("SHELORA_BAKERY_FLOUR_KG", "2.5")
    monkeypatch.setenv("SHELORA_BAKERY_METRICS_PORT", "-1")
    monkeypatch.setenv("SHELORA_BAKERY_READY_FILE", "/run/ready.json")
    monkeypatch.setenv("SHELORA_BAKERY_LOG_JSON", "true")
    settings = BakerySettings.load()
    assert (settings.flour_kg, settings.metrics_port, settings.log_json) == (2.5, -1, True)
    assert settings.ready_file == Path("/run/ready.json")


def test_a_flag_wins_over_the_environment_and_none_leaves_it(monkeypatch):
    monkeypatch.setenv("SHELORA_BAKERY_FLOUR_KG", "2.5")
    assert BakerySettings.load(flour_kg=3.0, listen=None).flour_kg == 3.0
    assert BakerySettings.load(flour_kg=None).flour_kg == 2.5


def test_nothing_is_served_beyond_this_machine_by_default():
    settings = BakerySettings(flour_kg=1.0)
    assert settings.listen.startswith("127.0.0.1:")
    assert settings.metrics_host == "127.0.0.1"


def test_a_missing_value_is_named_with_its_variable():
    assert (
        refused()
        == "flour_kg (environment variable SHELORA_BAKERY_FLOUR_KG): this field has no default: add it"
    )


def test_a_wrong_value_is_named_and_not_shown(monkeypatch):
    monkeypatch.setenv("SHELORA_BAKERY_METRICS_PORT", "hunter2")
    message = refused(flour_kg=1.0)
    assert "SHELORA_BAKERY_METRICS_PORT" in message
    assert "hunter2" not in message


def test_values_out_of_range_and_unknown_flags_are_refused():
    assert "metrics_port" in refused(flour_kg=1.0, metrics_port=70000)
    assert "log_level" in refused(flour_kg=1.0, log_level="LOUD")
    assert "calls_per_s" in refused(flour_kg=1.0, calls_per_s=float("inf")), (
        "ten seconds' worth was a traceback"
    )
    assert "sugar" in refused(flour_kg=1.0, sugar=1)


def test_settings_cannot_be_changed():
    settings = BakerySettings(flour_kg=1.0)
    with pytest.raises(ValidationError):
        settings.flour_kg = 2.0


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host:6379/0", "redis://:p%40%2F%3A%20%25@host:6379/0"),
        (
            "rediss://user@host:6380/1?ssl_ca_certs=/ca.pem",
            "rediss://user:p%40%2F%3A%20%25@host:6380/1?ssl_ca_certs=/ca.pem",
        ),
    ],
)
def test_a_password_file_completes_the_url_whatever_it_holds(tmp_path, url, expected):
    (tmp_path / "password").write_text("p@/: %\n")
    assert with_password(SecretStr(url), tmp_path / "password") == expected
    assert with_password(SecretStr(url), None) == url
    assert parse_url(expected)["password"] == "p@/: %"


def test_two_passwords_or_an_unreadable_one_are_refused(tmp_path):
    for url, problem in (("redis://:x@host/0", "already"), ("redis://host/0", "cannot be read")):
        with pytest.raises(DomainError, match=problem) as caught:
            with_password(SecretStr(url), tmp_path / "none")
        assert caught.value.reason is Reason.CONFIGURATION_INVALID
