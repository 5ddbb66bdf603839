"""Writes NVFLARE's job, FedAvg of a NumPy model over all clients, into the folder given: `nvflare_job.py FOLDER`."""

import sys

from nvflare.app_common.np.recipes import NumpyFedAvgRecipe
from work import PLAN

recipe = NumpyFedAvgRecipe(
    name="peer",
    initial_ckpt=PLAN["initial"],
    min_clients=len(PLAN["clients"]),
    num_rounds=PLAN["rounds"] + 1,
    train_script=PLAN["script"],
)
recipe.export(sys.argv[1])
