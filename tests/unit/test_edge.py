"""What a device's owner is given: a configuration to start from, an installer, a unit."""

import subprocess
from pathlib import Path

from client_agent.config import AgentConfig

EDGE = Path(__file__).parents[2] / "deploy" / "edge"
INSTALLER = EDGE / "install.sh"


def test_the_configuration_for_a_small_device_is_valid_and_its_state_lies_where_the_unit_may_write():
    config = AgentConfig.load(EDGE / "raspberry-pi.yaml", {})
    assert config.lora.rank <= 8
    assert config.resources.micro_batch == 2
    assert config.state_dir.is_relative_to("/var/lib/shelora-agent")


def test_the_unit_runs_what_the_installer_installs_and_as_whom_it_makes():
    lines = INSTALLER.read_text().splitlines()
    unit = (EDGE / "client-agent.service").read_text()
    values = dict(
        line.split("=", 1) for line in lines if line.startswith(("PREFIX=", "CONFIG=", "STATE=", "NAME="))
    )
    command = f"{values['PREFIX']}/venv/bin/client-agent run --config {values['CONFIG']}/agent.yaml"
    assert f"\nExecStart={command}\n" in unit
    assert f"\nUser={values['NAME']}\n" in unit
    assert f"\nWorkingDirectory={values['STATE']}\n" in unit


def test_the_installer_explains_itself_and_refuses_what_it_does_not_know():
    told = subprocess.run(["sh", INSTALLER, "--help"], capture_output=True, text=True, check=True)
    assert "TORCH_INDEX=URL" in told.stdout
    refused = subprocess.run(["sh", INSTALLER, "--tokens"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "unknown argument --tokens" in refused.stderr
