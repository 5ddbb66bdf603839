"""Attacks on captured messages of real runs: `make attack` measures what each protection mode gives away.

The attacker holds serialized messages (what aggregation, coordinator and Redis were sent and stored), the public base
model, public text and the specification; in some rows also the secrets of one colluding client. Nothing else: private
text and the victims' state are read only to score the guesses. docs/threat-model.md quotes the table.
"""
