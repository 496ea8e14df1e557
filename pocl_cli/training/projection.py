"""The projection of an output head with its gradient, for one chunk of tokens at a time.

n tokens of a chunk, D hidden size, V rows of the output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pocl_cli.models.head import OutputHead

# From the gradient of the projected chunk `[n, V]` to that of its hidden states `[n, D]`. Adds what the chunk gives to
# the head's parameters to the second argument, one total a parameter.
Backward = Callable[[Tensor, Sequence[Tensor]], Tensor]


def project_with_gradient(head: OutputHead, hidden_nD: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Backward]:
    """`head.project` of a chunk `[n, V]`, which the caller may overwrite, and its backward pass.

    Args:
        head: only its projection runs here.
        hidden_nD: hidden states.
        parameters: those of the head that are trained.
    """
    projection = head.projection
    if projection is None:
        return hidden_nD.detach().clone(), lambda gradient_nV, totals: gradient_nV
    if type(projection) is nn.Linear:
        return _linear(projection, hidden_nD, parameters)
    return _any_module(projection, hidden_nD, parameters)


def _linear(projection: nn.Linear, hidden_nD: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Backward]:
    """Adds the weight's gradient in place: autograd would make one of the weight's size for every chunk."""
    weight_VD, bias_V = projection.weight, projection.bias
    with torch.no_grad():
        projected_nV = projection(hidden_nD)

    @torch.no_grad()
    def backward(gradient_nV: Tensor, totals: Sequence[Tensor]) -> Tensor:
        for parameter, total in zip(parameters, totals, strict=True):
            if parameter is bias_V:
                total += gradient_nV.sum(dim=0, dtype=total.dtype)
            elif total.dtype == gradient_nV.dtype:
                total.addmm_(gradient_nV.t(), hidden_nD.to(gradient_nV.dtype))
            else:
                total += gradient_nV.t() @ hidden_nD.to(gradient_nV.dtype)
        return gradient_nV @ weight_VD.to(gradient_nV.dtype)

    return projected_nV, backward


def _any_module(projection: nn.Module, hidden_nD: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Backward]:
    with torch.enable_grad():
        leaf_nD = hidden_nD.detach().requires_grad_(True)
        projected_nV = projection(leaf_nD)

    def backward(gradient_nV: Tensor, totals: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(
            projected_nV, (leaf_nD, *parameters), gradient_nV, allow_unused=True, materialize_grads=True
        )
        for total, part in zip(totals, gradients[1:], strict=True):
            total += part
        return gradients[0]

    # A copy: what the module keeps for its backward pass may be its output.
    return projected_nV.detach().clone(), backward
