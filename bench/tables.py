"""What the benchmark's tables have in common."""

from rich.table import Table


def ways_table(title: str) -> Table:
    """A table with a row a way. Names are not cut, however narrow it is."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in (
        "up, a client",
        "down",
        "a client protects",
        "servers aggregate",
        "error, of ΔW's largest entry",
        "in the clear",
    ):
        table.add_column(heading, justify="right")
    return table
