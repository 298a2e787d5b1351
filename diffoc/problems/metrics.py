"""Metrics of images and of sets of images."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from diffoc.checks import check_images, check_tensor

SMALLEST = 11  # side of an image in which SSIM has a whole window


def image_metrics(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Returns PSNR in dB, SSIM and MSE of images in [-1, 1], clipped to that range, (B,) each.

    The MSE is that on [-1, 1], four times the one on [0, 1]; :func:`mse_255` has the paper's scale.
    The PSNR is the same on all. SSIM, which depends on where black is, is taken on [0, 1]: that of
    Wang et al. 2004 (doi:10.1109/TIP.2003.819861), with Gaussian windows of 11 x 11 pixels and
    standard deviation 1.5 that lie wholly within the image, whose sides are at least 11.
    """
    if images.shape != truth.shape or images.ndim != 4 or min(images.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"images and truth have shapes {tuple(images.shape)} and {tuple(truth.shape)}, "
            "expected the same (B, C, H, W), H and W at least 11"
        )
    check_images("images", images)
    check_images("truth", truth)
    images, truth = images.clamp(-1, 1), truth.clamp(-1, 1)
    mse = (images - truth).square().flatten(1).mean(dim=1)
    _, ssim = structural_similarity_index_measure(
        (images + 1) / 2, (truth + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    # torchmetrics would count the windows that reach beyond the border.
    ssim = ssim[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    return {"psnr": 10 * torch.log10(4 / mse), "ssim": ssim, "mse": mse}


def mse_255(mse: Tensor) -> Tensor:
    """Returns the MSE on 0..255, as in the paper's Table 3, from that of images in [-1, 1].

    The table's 117.0 beside 27.45 dB is this one: 10 log10(255^2 / 117.0) = 27.45.
    """
    return 127.5**2 * mse


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Returns the squared Fréchet distance between Gaussians fitted to features (N, d) and (M, d).

    It is what is called FID when the features are Inception's; sets of fewer images than features,
    or of different sizes, bias it upwards. Both have at least two rows.

    Source: Heusel et al. 2017, arXiv:1706.08500, Eq. 6.
    """
    return frechet_between(moments(first, "first"), moments(second, "second"))


def moments(features: Tensor, name: str = "features") -> tuple[Tensor, Tensor]:
    """Returns mean (d,) and covariance (d, d) of features (N, d); errors call them `name`."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (N >= 2, d)")
    check_tensor(name, features)
    features = features.double().cpu()
    return features.mean(0), torch.cov(features.mT).reshape(2 * features.shape[1:])


def frechet_between(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    r"""Returns the squared Fréchet distance of two Gaussians, mean (d,) and covariance (d, d) each.

    .. math:: \|\mu_1 - \mu_2\|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})
    """
    (mu1, c1), (mu2, c2) = ((m.double(), c.double()) for m, c in (first, second))
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"first and second have {len(mu1)} and {len(mu2)} features, expected equal"
        )
    # With R_i = C_i^1/2, tr (C_1 C_2)^1/2 is the nuclear norm of R_1 R_2, which is tr(U' R_1 R_2)
    # with the polar factor U of R_1 R_2. So the rest of the distance is a sum of squares,
    # |R_1 - U R_2|_F^2: never negative, and zero of equal sets up to rounding squared.
    root1, root2 = _root(c1), _root(c2)
    left, _, right = torch.linalg.svd(root1 @ root2)
    distance = (mu1 - mu2).square().sum() + (root1 - left @ right @ root2).square().sum()
    return distance.item()


def _root(covariance: Tensor) -> Tensor:
    """Returns the symmetric square root of a covariance (d, d)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
