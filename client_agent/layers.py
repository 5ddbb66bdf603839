"""Layers that are adapted, seen as matrices: linear ones, and convolutions by the patches that they look at.

A convolution with weights [out, in, height, width] multiplies each patch [in * height * width] of its input by the
matrix [out, in * height * width]. PEFT's factors of it are a convolution A to `rank` channels and a 1 x 1 convolution B
from there (`peft.tuners.lora.layer.Conv2d`), so that the product of both matrices is what is added to its matrix.
"""

from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from transformers.pytorch_utils import Conv1D

LINEAR: Final = (nn.Linear, Conv1D)


def obstacle(module: nn.Module) -> str:
    """Why a module cannot be adapted, to follow "only"; "" if it can.

    What PEFT adapts otherwise than the module computes is left out: it knows no dilation, and pads A's input with
    zeros. The B that it gives a grouped convolution is grouped, too; a sum that is cut to a rank has no such B.
    """
    if isinstance(module, LINEAR):
        return ""
    if type(module) is not nn.Conv2d:  # a subclass may compute anything
        return (
            "linear layers and plain convolutions (Conv2d) can be adapted, and no experts that are stacked in one "
            "parameter"
        )
    if module.groups > 1:
        return "convolutions of one group can be adapted, no grouped or depthwise ones"
    if set(module.dilation) != {1}:
        return "convolutions without dilation can be adapted"
    if module.padding_mode != "zeros":
        return f"convolutions that pad with zeros can be adapted, and this one pads in mode {module.padding_mode}"
    return ""


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution that can be adapted."""
    return isinstance(module, nn.Conv2d) and not obstacle(module)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """[out, in] of the matrix that an adaptable layer is."""
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        return layer.out_channels, layer.in_channels * height * width
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    linear: Any = layer  # of torch or of bitsandbytes
    return linear.out_features, linear.in_features


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a convolution, or of a factor of one, as a matrix [first dimension, all others]; others as is."""
    return weight.flatten(1)


def product(layer: nn.Module, x: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """What B [out, k] A [k, in] adds to the result of a layer for its input; of the input's type."""
    if not isinstance(layer, nn.Conv2d):
        return x @ A.T @ B.T
    kernel = A.view(len(A), layer.in_channels, *layer.kernel_size)
    inner = functional.conv2d(x, kernel, stride=layer.stride, padding=layer.padding)
    return functional.conv2d(inner, B[:, :, None, None])


def squared_inputs(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The squares of everything that reaches each column of a layer's matrix, added up, [in], float64.

    Args: x: Activations [..., in] of a linear layer; [examples, in, height, width] of a convolution, whose columns see
        the positions of their patches, padding included as zeros.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).double().square().sum(dim=0)
    squares = _padded(layer, x.double().square())
    height, width = layer.kernel_size
    # The sum over all patches is the weights' gradient of a convolution whose results are all added up.
    results = squares.new_ones(
        len(x),
        1,
        (squares.shape[2] - height) // layer.stride[0] + 1,
        (squares.shape[3] - width) // layer.stride[1] + 1,
    )
    shape = (1, layer.in_channels, height, width)
    sums: torch.Tensor = conv2d_weight(squares, shape, results, stride=layer.stride)  # type: ignore[no-untyped-call]
    return sums.flatten()


def _padded(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The input with the zeros that the convolution sees around it."""
    if layer.padding == "valid":
        return x
    if layer.padding == "same":  # of an even kernel, one more at the end
        around = [((size - 1) // 2, size // 2) for size in layer.kernel_size]
    else:
        around = [(int(width), int(width)) for width in layer.padding]
    (top, bottom), (left, right) = around
    return functional.pad(x, (left, right, top, bottom))


def hold_statistics(model: nn.Module) -> None:
    """Has every batch norm use its running statistics, in training too, so that they never change.

    Clients whose examples differ would otherwise each train around statistics of their own. With those of the base
    model, all train and evaluate the same function: as in fine-tuning detectors (He et al., Mask R-CNN, ICCV 2017,
    "frozen BN") and in federated learning (Zhong et al., "Making Batch Normalization Great in Federated Deep Learning",
    arXiv 2303.06530, whose FixBN fixes them from some round on).
    """
    for module in model.modules():
        if keeps_statistics(module):
            # Whoever trains calls train() on the whole model, so it is said again before each use.
            module.register_forward_pre_hook(_evaluates)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it normalizes by running statistics of what it has seen."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats  # noqa: SLF001


def _evaluates(module: nn.Module, _inputs: object) -> None:
    module.eval()
