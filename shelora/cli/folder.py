"""Names by which a local cluster's folder and processes are known to who starts it and to who ends it."""

from typing import Final

ADDRESSES: Final = "cluster.json"
"""File in a cluster's folder that says where it is, while it runs."""
MARK: Final = "SHELORA_LOCAL_CLUSTER"
"""Environment variable of every process of a local cluster: its folder."""
STOP_TIMEOUT_S: Final = 25.0
"""Longer than the servers' own drain."""
LOCK: Final = "cluster.lock"
"""File in a cluster's folder, locked while the cluster has processes; it names the supervisor."""
