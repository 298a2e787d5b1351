"""Randomised approximation against the true spectrum."""

import pytest
import torch

from diffoc.hessian import nystrom, symmetric_eigen


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrix(values, seed=0, batch=2):
    """Symmetric matrices with the given eigenvalues."""
    Q = torch.linalg.qr(random(batch, len(values), len(values), seed=seed)).Q
    return (Q * values) @ Q.mT


DECAY = 2.0 ** -torch.arange(40, dtype=torch.float64)


@pytest.mark.parametrize("method", [symmetric_eigen, nystrom])
def test_a_matrix_of_low_rank_is_found_exactly(method):
    values = torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.zeros(27)]).double()
    A = matrix(values)
    vectors, found = method(lambda X: A @ X, random(2, 30, 5, seed=1), 3)
    torch.testing.assert_close(found, values[:3].expand(2, 3), rtol=1e-9, atol=0)
    torch.testing.assert_close((vectors * found.unsqueeze(-2)) @ vectors.mT, A, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [symmetric_eigen, nystrom])
@pytest.mark.parametrize("directions", [1, 3])
def test_of_rank_zero_nothing_is_left(method, directions):
    A = matrix(DECAY[:5])
    vectors, values = method(lambda X: A @ X, random(2, 5, directions, seed=1), 0)
    assert (vectors.shape, values.shape) == ((2, 5, 0), (2, 0))


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
    ):
        counted.clear()
        call(random(2, 40, 8, seed=6))
        assert sum(counted) == expected


# Equal eigenvalues: which eigenvectors are kept must not be chosen by rounding.

METHODS = [symmetric_eigen, nystrom]
EQUAL = {
    "a mask's": torch.cat([torch.full((20,), 400.0), torch.zeros(20)]),
    "two groups": torch.tensor([7.0] * 3 + [4.0] * 5 + [2.0, 1.0] + [0.0] * 30),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_of_a_projector_the_projected_directions_are_kept(method, rank):
    projector = matrix(EQUAL["a mask's"].double()) / 400
    omega = random(2, 40, 8, seed=7)
    vectors, values = method(lambda X: 400 * projector @ X, omega, rank)
    expected = torch.linalg.qr(projector @ omega[..., :rank]).Q
    torch.testing.assert_close(vectors @ vectors.mT, expected @ expected.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(values, torch.full_like(values, 400))


@pytest.mark.parametrize("method", METHODS)
def test_whole_groups_are_those_of_a_dense_decomposition(method):
    """Behind them come the projections onto the next group, and single eigenvectors are as ever."""
    A = matrix(EQUAL["two groups"].double())
    omega = random(2, 40, 12, seed=8)
    _, dense = torch.linalg.eigh(A)
    sizes = {3: slice(37, 40), 8: slice(32, 40), 9: slice(31, 40), 10: slice(30, 40)}
    for rank, of_dense in sizes.items():
        vectors, _ = method(lambda X: A @ X, omega, rank)
        expected = dense[..., of_dense] @ dense[..., of_dense].mT
        torch.testing.assert_close(vectors @ vectors.mT, expected, rtol=0, atol=1e-6)
    vectors, values = method(lambda X: A @ X, omega, 5)
    second = dense[..., 32:37] @ dense[..., 32:37].mT @ omega[..., :2]
    expected = torch.linalg.qr(second).Q
    kept = vectors[..., 3:]
    torch.testing.assert_close(kept @ kept.mT, expected @ expected.mT, rtol=0, atol=1e-6)
    torch.testing.assert_close(values[0], torch.tensor([7.0, 7, 7, 4, 4]).double())


@pytest.mark.parametrize("method", METHODS)
def test_a_spectrum_without_gaps_is_exact_where_nothing_is_cut_off(method):
    """Neighbours closer than the tolerance all the way down are no one group."""
    A = matrix(torch.logspace(0, -12, 40, dtype=torch.float64))
    vectors, values = method(lambda X: A @ X, random(2, 40, 40, seed=9), 40)
    found = vectors @ values.diag_embed() @ vectors.mT
    torch.testing.assert_close(found, A.expand(2, -1, -1), rtol=0, atol=1e-13)


def test_of_one_magnitude_the_positive_come_first():
    A = matrix(torch.tensor([3.0] * 2 + [-3.0] * 2 + [0.0] * 6).double())
    for seed in range(5):
        _, values = symmetric_eigen(lambda X: A @ X, random(2, 10, 6, seed=seed), 3)
        torch.testing.assert_close(values, torch.tensor([[3.0, 3, -3]] * 2).double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", EQUAL)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(("dtype", "jitter"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_a_jitter_moves_what_is_kept_by_its_own_size(method, group, rank, dtype, jitter):
    A = matrix(EQUAL[group].double(), batch=1)
    omega = random(1, 40, 6, seed=9).to(dtype)
    found = []
    for seed in range(20, 25):
        noise = jitter * A.abs().max() * random(1, 40, 40, seed=seed)
        moved = (A + (noise + noise.mT) / 2).to(dtype)
        vectors, values = method(lambda X, moved=moved: moved @ X, omega, rank)
        found.append((vectors * values.unsqueeze(-2)) @ vectors.mT / values.amax())
    spread = (torch.stack(found) - found[0]).abs().amax().item()
    assert spread < 500 * jitter


def test_a_mask_s_factor_is_the_same_alone_and_among_others():
    mask = (torch.arange(64) % 5 == 0).float()
    omega = random(1, 64, 6, seed=10).float().expand(3, -1, -1)
    both = nystrom(lambda X: 400 * mask[:, None] * X, omega, 1)[0]
    expected = mask[:, None] * omega[..., :1]
    torch.testing.assert_close(both.abs(), (expected / expected.norm(dim=1, keepdim=True)).abs())
