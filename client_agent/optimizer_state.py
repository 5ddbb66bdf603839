"""What torch's AdamW holds, as `client_agent.moments` and back."""

import numpy as np
import torch

from client_agent.model import AdaptedModel
from client_agent.moments import REMEMBERED, Estimates, Moments
from shelora.lora.shards import Float32


def resume(optimizer: torch.optim.Optimizer, model: AdaptedModel, moments: Moments) -> None:
    """Has a new AdamW of the model's parameters go on from estimates.

    Raises: MODEL_INVALID if they are of another model.
    """
    means, squares = dict(model.paired(moments.mean)), dict(model.paired(moments.square))
    packed = optimizer.state_dict()
    mean_decay, square_decay = packed["param_groups"][0]["betas"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {
        position: {
            "step": torch.tensor(float(moments.steps)),
            "exp_avg": _biased(means[parameter], mean_decay, moments.steps).view_as(parameter),
            "exp_avg_sq": _biased(squares[parameter], square_decay, moments.steps).view_as(parameter),
        }
        for position, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict(packed)


def noted(optimizer: torch.optim.Optimizer, model: AdaptedModel) -> Moments:
    """The estimates of an AdamW that has trained the model's parameters."""
    mean_decay, square_decay = optimizer.param_groups[0]["betas"]
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)

    def unbiased(name: str, decay: float) -> Estimates:
        def of(parameter: torch.nn.Parameter) -> torch.Tensor:
            held = optimizer.state.get(parameter)
            return held[name] / (1 - decay ** int(held["step"])) if held else torch.zeros_like(parameter)

        return model.gathered(of)

    return Moments(
        steps=min(steps, REMEMBERED),
        mean=unbiased("exp_avg", mean_decay),
        square=unbiased("exp_avg_sq", square_decay),
    )


def _biased(estimate: Float32, decay: float, steps: int) -> torch.Tensor:
    return torch.from_numpy(estimate * np.float32(1 - decay**steps))
