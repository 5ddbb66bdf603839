"""A coordinator whose operator changed it: whatever members can afford, a thousandth of the columns is encrypted.

On the path of a server's process, Python runs this before anything else; other processes are left alone.
"""

import sys

if any("coordinator.main" in argument for argument in getattr(sys, "orig_argv", [])):
    from coordinator import decisions, transitions

    transitions.budgets = lambda members: (0.001,)
    decisions.covered_by = lambda plan, view: frozenset(view.alive)
