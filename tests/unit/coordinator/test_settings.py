from pathlib import Path

import pytest

from coordinator.settings import CoordinatorSettings
from shelora.errors import DomainError

GIVEN = {
    "identity": Path("identity"),
    "key_authority_address": "127.0.0.1:1",
    "aggregation_addresses": ("127.0.0.1:2",),
}


def test_what_was_heard_of_a_client_is_kept_for_as_long_as_it_counts_as_alive():
    settings = CoordinatorSettings.load(**GIVEN, max_members=30_000)
    assert settings.liveness.patience_s(settings.max_members) <= settings.sighting_s
    with pytest.raises(DomainError) as caught:
        CoordinatorSettings.load(**GIVEN, max_members=30_001)
    assert "raise sighting_s or heartbeats_per_s" in caught.value.message
