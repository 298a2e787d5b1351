"""Metrics, against closed forms and other computations."""

import pytest
import scipy.linalg
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)

from diffoc.problems.metrics import frechet_distance, image_metrics, mse_255


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
    assert 0 <= frechet_distance(a, a) < 1e-10 * a.var(0).sum()
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-10 * a.var(0).sum()
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


def test_psnr_ssim_and_mse_are_scikit_image_s():
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.rand(3, 3, 24, 32, generator=generator, dtype=torch.float64) - 1
    images = truth + 0.3 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    found = image_metrics(images, truth)
    for i in range(3):
        a, b = (((v[i] + 1) / 2).movedim(0, -1).numpy() for v in (images.clamp(-1, 1), truth))
        psnr = peak_signal_noise_ratio(b, a, data_range=1)
        ssim = structural_similarity(
            b,
            a,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert found["psnr"][i].item() == pytest.approx(psnr, abs=1e-9)
        assert found["mse"][i].item() == pytest.approx(4 * mean_squared_error(b, a))
        assert found["ssim"][i].item() == pytest.approx(ssim, abs=1e-7)


def test_metrics_by_hand():
    truth = torch.zeros(1, 1, 16, 16)
    found = image_metrics(truth + 0.2, truth)
    assert found["mse"].item() == pytest.approx(0.04)
    assert found["psnr"].item() == pytest.approx(20)
    # Of constant images the contrast term is 1, and C1 = 0.01^2; on [0, 1] they are 0.5 and 0.6.
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert found["ssim"].item() == pytest.approx(expected, rel=1e-4)
    assert image_metrics(truth + 5, truth)["mse"].item() == pytest.approx(1)  # clipped


@pytest.mark.parametrize(
    ("psnr", "mse"), [(27.45, 117.0), (31.84, 42.57), (25.33, 190.6), (25.67, 176.2)]
)
def test_mse_and_psnr_are_those_of_a_row_of_the_paper_s_table_3(psnr, mse):
    truth = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    found = image_metrics(truth + mse**0.5 / 127.5, truth)
    assert mse_255(found["mse"]).item() == pytest.approx(mse)
    assert found["psnr"].item() == pytest.approx(psnr, abs=0.005)


def test_psnr_is_torchmetrics_on_0_to_255():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(256, (2, 1, 16, 16), generator=generator).double()
    levels = (truth + 3 * torch.randn(truth.shape, generator=generator).double()).clamp(0, 255)
    images, signed = levels / 127.5 - 1, truth / 127.5 - 1
    found = image_metrics(images, signed)
    for i in range(2):
        expected = torchmetrics_psnr(levels[i], truth[i], data_range=255.0)  # in float32
        assert found["psnr"][i].item() == pytest.approx(expected.item(), abs=1e-5)
        expected = (levels[i] - truth[i]).square().mean().item()
        assert mse_255(found["mse"][i]).item() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 16, 15), torch.full((1, 1, 16, 16), torch.nan)])
def test_unfit_images_are_refused(bad):
    with pytest.raises(ValueError, match="images"):
        image_metrics(bad, torch.zeros(1, 1, 16, 16))
