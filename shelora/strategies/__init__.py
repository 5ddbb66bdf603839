"""How updates are protected: a strategy is one object in two halves (docs/strategies.md).

The modules here are public halves, which every party may import. `shelora.strategies.agents` holds the secret halves,
which agents alone import.
"""
