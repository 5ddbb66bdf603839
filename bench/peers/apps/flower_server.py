"""Flower's ServerApp: FedAvg over all clients, in every round. It needs no torch."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds."""
    options = context.run_config
    strategy = FedAvg(min_available_nodes=int(options["clients"]))
    initial = ArrayRecord([np.load(str(options["initial"]))])
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(options["rounds"]))
