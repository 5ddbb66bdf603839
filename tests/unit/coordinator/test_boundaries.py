import subprocess
import sys

SECRET = (
    "tenseal",
    "shelora.ckks.secret",
    "shelora.obfuscation",
    "torch",
    "client_agent",
    "services.key_authority",
)


def test_the_coordinator_loads_no_code_that_can_hold_a_secret():
    listing = "import sys, coordinator.main; print('\\n'.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", listing], check=True, capture_output=True, text=True
    ).stdout
    assert [m for m in loaded.splitlines() if m.startswith(SECRET)] == []
