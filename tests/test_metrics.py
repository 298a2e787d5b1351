"""Metrics, against closed forms and other computations."""

import pytest
import scipy.linalg
import torch

from diffoc.metrics import frechet_distance


def features(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator).double()
    return torch.randn(count, size, generator=generator).double() @ mixing


def test_frechet_distance_is_the_matrix_square_root_s():
    a, b = features(300, 6, 0), features(200, 6, 1) + 0.5
    c1, c2 = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (c1 + c2 - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_one_feature_is_elementary():
    a, b = features(50, 1, 2), features(70, 1, 3)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_to_itself_is_zero_even_of_few_images():
    a = features(5, 20, 4)
    assert abs(frechet_distance(a, a)) < 1e-6 * a.var(0).sum()
    assert frechet_distance(a, a + 2) == pytest.approx(20 * 4, rel=1e-6)


def test_frechet_distance_refuses_what_it_cannot_use():
    a = features(5, 3, 5)
    with pytest.raises(ValueError, match="first has shape"):
        frechet_distance(a[0], a)
    with pytest.raises(ValueError, match="second has shape"):
        frechet_distance(a, a[:1])
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="second has values that are not finite"):
        frechet_distance(a, a / 0)
