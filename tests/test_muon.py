import pytest
import torch
from torch import nn

from minunclip.muon import Muon, orthogonalize


@pytest.mark.parametrize("fast", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_directions_stay_and_singular_values_become_about_one(shape, fast, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix[None])[0]
    assert found.shape == shape and found.dtype == matrix.dtype
    values = (u.mT @ found @ vh.mT).diagonal()  # in the directions of the matrix itself
    assert (values > 0.6).all() and (values < 1.3).all()
    rest = u.mT @ found @ vh.mT - values.diag()
    assert rest.abs().max() < 0.05
    torch.testing.assert_close(orthogonalize(1000 * matrix[None])[0], found, atol=0.05, rtol=0)


def test_a_stack_is_its_matrices_one_by_one():
    stack = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    torch.testing.assert_close(orthogonalize(stack), torch.cat([orthogonalize(matrix[None]) for matrix in stack]), atol=1e-2, rtol=0)


def test_one_step_is_momentum_orthogonalised_at_the_size_of_an_adamw_step():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    before, gradient = kernel.detach().clone(), torch.randn(8, 4, 3, 3)
    optimizer = Muon([kernel], lr=0.1, weight_decay=0.5)
    kernel.grad = gradient.clone()
    optimizer.step()
    # the first average is 0.05 g, Nesterov adds the gradient itself: a multiple of g, whose length is lost
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 36**0.5 * orthogonalize(gradient.flatten(1)[None]).view_as(kernel)
    torch.testing.assert_close(kernel.detach(), expected, atol=0.01, rtol=0)
    step = (kernel.detach() - before * 0.95).square().mean().sqrt() / 0.1
    assert 0.1 < step < 0.3


def test_the_second_step_looks_ahead_along_the_average_of_both_gradients():
    first, second = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(8, 20))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = first.clone()
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = second.clone()
    optimizer.step()
    average = 0.95 * 0.05 * first + 0.05 * second
    expected = 0.1 * 0.2 * 20**0.5 * orthogonalize((0.05 * second + 0.95 * average)[None])[0]
    torch.testing.assert_close(before - weight.detach(), expected, atol=0.01, rtol=0)


def test_it_fits_a_matrix_that_is_badly_scaled():
    torch.manual_seed(0)
    x = torch.randn(256, 8) @ torch.diag(torch.tensor([10.0, 5, 2, 1, 0.5, 0.2, 0.1, 0.05]))
    wanted = torch.randn(8, 4)
    weight = nn.Parameter(torch.zeros(8, 4))
    optimizer, losses = Muon([weight], lr=0.1), []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        loss = ((x @ weight - x @ wanted) ** 2).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 1e-3 * losses[0]
