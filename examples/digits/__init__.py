"""Handwritten digits, split by class between three agents: `make demo-vision`."""
