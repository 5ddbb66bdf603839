"""What every server process shares: settings, health, metrics, logs, shutdown."""
