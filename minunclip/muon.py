"""Muon: an optimiser for matrices, whose authors report fewer steps than with AdamW: on a small computer each step counts.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", scaled as in Liu et al. 2025 (arXiv 2502.16982), so that
it shares AdamW's learning rate. Not of the paper, which uses AdamW; torch.optim.Muon takes no convolution kernels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from minunclip.distributed import is_share, shared_out, together

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a x + b x^3 + c x^5, which drives every singular value in (0, 1] to about 1


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16. A CPU without the instructions does it in a plain loop, a hundred times as slowly as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices (..., n, m) whose singular values are all about 1 (0.7 to 1.2), by Newton-Schulz iteration, in bf16 where that is fast.

    Their singular directions stay the same.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if bf16_is_fast(matrices.device) else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # X <- (a I + b S + c S^2) X with S = X X^T
        square = x @ x.mT
        polynomial = (square @ square).mul_(c).add_(square, alpha=b)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = polynomial @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters have two dimensions or more; a kernel (out, in, h, w) counts as (out, in * h * w).

    Of a sharded parameter every process orthogonalises the whole step, since no rows of it can be done alone, and takes its share.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # a GPU takes matrices of one shape through the iteration together, and waits for fewer launches; they would not fit a CPU's cache
            alike: dict[object, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape if parameter.is_cuda else parameter, []).append(parameter)
            for parameters in alike.values():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                for parameter in parameters:
                    if "average" not in self.state[parameter]:
                        self.state[parameter]["average"] = torch.zeros_like(parameter)
                averages = [self.state[parameter]["average"] for parameter in parameters]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
                matrices = [together(matrix).flatten(1) for matrix in ahead]
                directions = orthogonalize(torch.stack(matrices)) if len(matrices) > 1 else orthogonalize(matrices[0])[None]
                # an AdamW step has an RMS of about 0.2; that of an orthogonal (n, m) is 1 / sqrt(max(n, m))
                length = 0.2 * max(directions.shape[1:]) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                steps = [direction.view(parameter.shape) for direction, parameter in zip(directions, parameters)]
                steps = [shared_out(step, parameter) if is_share(parameter) else step for step, parameter in zip(steps, parameters)]
                torch._foreach_add_(parameters, steps, alpha=-group["lr"] * length)
