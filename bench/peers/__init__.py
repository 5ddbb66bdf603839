"""Our servers and agents beside Flower's deployment engine and NVFLARE's, on the demo's work (README.md)."""
