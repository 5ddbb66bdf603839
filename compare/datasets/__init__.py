"""Data sets, one object each: `compare.datasets.registry` names them."""
