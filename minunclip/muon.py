"""Muon: an optimiser for matrices, which on a small computer reaches in one step what takes AdamW nearly two.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", scaled as in Liu et al. 2025 (arXiv 2502.16982), so that
it shares AdamW's learning rate. Not of the paper, which uses Adam; torch.optim.Muon takes no convolution kernels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a x + b x^3 + c x^5, which drives every singular value in (0, 1] to about 1


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16. A CPU without the instructions does it in a plain loop, a hundred times as slowly as in float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix (n, m) whose singular values are all about 1 (0.7 to 1.2), by Newton-Schulz iteration, in bf16 where that is fast; same directions."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(torch.bfloat16 if bf16_is_fast(matrix.device) else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        # X <- a X + b (X X^T) X + c (X X^T)^2 X
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters have two dimensions or more; a kernel (out, in, h, w) counts as (out, in * h * w)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalize(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                # an AdamW step has an RMS of about 0.2; that of an orthogonal (n, m) is 1 / sqrt(max(n, m))
                length = 0.2 * max(direction.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.view_as(parameter), alpha=-group["lr"] * length)
