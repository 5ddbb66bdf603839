"""Attacks of strangers and of members who hold real certificates, on a cluster of real processes with its defaults.

`make test-insiders` runs them, one file `attack_*.py` a family. Every test shows first that its attack is really made.
"""
