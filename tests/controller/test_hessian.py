"""Randomised approximation against the true spectrum and the published bound."""

import pytest
import torch

from diffoc.hessian import nystrom, range_error_bound, range_finder, symmetric_eigen


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrix(values, seed=0, batch=2):
    """Symmetric matrices with the given eigenvalues."""
    Q = torch.linalg.qr(random(batch, len(values), len(values), seed=seed)).Q
    return (Q * values) @ Q.mT


DECAY = 2.0 ** -torch.arange(40, dtype=torch.float64)


@pytest.mark.parametrize("power", [0, 1])
def test_the_error_keeps_the_bound_of_halko_et_al(power):
    """Theorem 1.1 bounds the mean over the random directions; power iterations only help."""
    k, p = 6, 4
    A = matrix(DECAY, batch=1)
    errors = []
    for seed in range(30):
        Q = range_finder(lambda X: A @ X, random(1, 40, k + p, seed=seed), power)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(k + p, dtype=Q.dtype).expand(1, -1, -1))
        errors.append(torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), ord=2).item())
    mean = sum(errors) / len(errors)
    assert mean <= range_error_bound(DECAY[k].item(), 40, k, p)
    assert mean >= DECAY[k + p].item()  # no basis of k + p columns can be better


@pytest.mark.parametrize("method", [symmetric_eigen, nystrom])
def test_a_matrix_of_low_rank_is_found_exactly(method):
    values = torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.zeros(27)]).double()
    A = matrix(values)
    vectors, found = method(lambda X: A @ X, random(2, 30, 5, seed=1), 3)
    torch.testing.assert_close(found, values[:3].expand(2, 3), rtol=1e-9, atol=0)
    torch.testing.assert_close((vectors * found.unsqueeze(-2)) @ vectors.mT, A, rtol=0, atol=1e-9)


def test_negative_eigenvalues_are_kept_by_magnitude():
    values = torch.tensor([-4.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]).double()
    A = matrix(values)
    _, found = symmetric_eigen(lambda X: A @ X, random(2, 8, 5, seed=2), 2)
    torch.testing.assert_close(found, torch.tensor([[-4.0, 2.0]]).double().expand(2, 2))


@pytest.mark.parametrize("method", [symmetric_eigen, nystrom])
def test_truncation_is_nearly_the_best(method):
    A = matrix(DECAY)
    vectors, values = method(lambda X: A @ X, random(2, 40, 14, seed=3), 8)
    error = torch.linalg.matrix_norm(A - (vectors * values.unsqueeze(-2)) @ vectors.mT, ord=2)
    assert (error < 2 * DECAY[8]).all()


@pytest.fixture(params=[False, True], ids=["denormals", "flushed"])
def _denormals(request):
    """The command line flushes denormal numbers to zero; both must work."""
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_denormals")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nystrom_survives_a_zero_and_a_rank_one_matrix(dtype):
    directions = random(1, 20, 4, seed=4).to(dtype)
    vectors, values = nystrom(torch.zeros_like, directions, 2)
    assert (values < 1e-18).all()
    assert vectors.isfinite().all()
    v = torch.nn.functional.normalize(random(1, 20, 1, seed=5).to(dtype), dim=1)
    _, values = nystrom(lambda X: 7 * v @ (v.mT @ X), directions, 2)
    torch.testing.assert_close(values[0], torch.tensor([7.0, 0.0], dtype=dtype), atol=1e-4, rtol=0)


def test_products_are_as_few_as_promised():
    A, counted = matrix(DECAY), []

    def product(X):
        counted.append(X.shape[-1])
        return A @ X

    for call, expected in (
        (lambda d: nystrom(product, d, 3), 8),
        (lambda d: symmetric_eigen(product, d, 3), 16),
        (lambda d: symmetric_eigen(product, d, 3, power=2), 32),
    ):
        counted.clear()
        call(random(2, 40, 8, seed=6))
        assert sum(counted) == expected


def test_the_bound_s_theorem_has_conditions():
    with pytest.raises(ValueError, match="rank and oversampling are 1 and 5"):
        range_error_bound(1.0, 10, 1, 5)
    with pytest.raises(ValueError, match="together at most 10"):
        range_error_bound(1.0, 10, 6, 5)
