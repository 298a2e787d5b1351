"""The measurement operators against loops and counts."""

import math

import pytest
import torch

from diffoc.problems.operators import LinearMeasurement, as_matrix, average_pool, random_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_average_pool_is_the_mean_of_blocks(factor):
    x = normal(2, 3, 8, 12)
    y = average_pool(factor)(x)
    assert y.shape == (2, 3, 8 // factor, 12 // factor)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            rows = slice(i * factor, (i + 1) * factor)
            columns = slice(j * factor, (j + 1) * factor)
            expected = x[:, :, rows, columns].sum(dim=(2, 3)) / factor**2
            torch.testing.assert_close(y[:, :, i, j], expected)


@pytest.mark.parametrize("factor", [0, -1])
def test_average_pool_door(factor):
    with pytest.raises(ValueError, match=r"^factor"):
        average_pool(factor)


@pytest.mark.parametrize("dropped", [0.0, 0.3, 0.92, 0.95])
def test_random_mask_keeps_the_fraction_and_the_same_pixels_everywhere(dropped):
    height, width = 16, 24
    operator = random_mask((height, width), dropped, seeded(1))
    count = height * width - round(dropped * height * width)
    # every pixel of every channel and image is its own index
    index = torch.arange(height * width, dtype=torch.float64).reshape(1, 1, height, width)
    y = operator(index.expand(4, 3, -1, -1))
    assert y.shape == (4, 3, count)
    assert torch.equal(y, y[:1, :1].expand(4, 3, -1))
    kept = y[0, 0].long()
    assert len(kept.unique()) == count
    assert (kept.diff() > 0).all()
    x = normal(4, 3, height, width)
    expected = torch.stack([x[:, :, k // width, k % width] for k in kept.tolist()], dim=-1)
    assert torch.equal(operator(x), expected)


def test_random_mask_is_seeded_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    x = normal(1, 1, 16, 16)
    one, again, other = (random_mask((16, 16), 0.5, seeded(s))(x) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_mask_drops_every_pixel_equally_often():
    draws, pixels = 2000, 12
    generator, index = seeded(3), torch.arange(float(pixels)).reshape(1, 1, 3, 4)
    counts = torch.zeros(pixels)
    for _ in range(draws):
        counts[random_mask((3, 4), 0.5, generator)(index).long().flatten()] += 1
    z = (counts - draws / 2) / math.sqrt(draws / 4)
    assert z.abs().max() < 4.5


@pytest.mark.parametrize("dropped", [-0.1, 1.0, 1.5, math.nan])
def test_random_mask_door(dropped):
    with pytest.raises(ValueError, match=r"^dropped"):
        random_mask((4, 4), dropped, seeded())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        lambda: average_pool(2),
        lambda: random_mask((4, 6), 0.7, seeded(2)),
        lambda: lambda x: 2 * x.roll(1, -1) - x.mean(dim=1, keepdim=True),
    ],
    ids=["pool", "mask", "mixing"],
)
def test_as_matrix_is_the_operator(make, dtype):
    operator, shape = make(), (3, 4, 6)
    A = as_matrix(operator, shape, dtype)
    x = normal(5, *shape).to(dtype)
    y = operator(x).flatten(1)
    assert A.dtype == dtype
    assert A.is_contiguous()
    assert A.shape == (y.shape[1], 72)
    torch.testing.assert_close(x.flatten(1) @ A.mT, y)


def test_as_matrix_of_a_mask_is_rows_of_the_identity():
    A = as_matrix(random_mask((4, 4), 0.5, seeded(2)), (2, 4, 4), torch.float64)
    assert torch.equal(A @ A.mT, torch.eye(16, dtype=torch.float64))
    assert A.sum() == 16


def test_as_matrix_of_flat_states_returns_the_matrix():
    A = normal(3, 5)
    assert torch.equal(as_matrix(lambda x: x @ A.mT, (5,), torch.float64), A)


def test_as_matrix_door():
    with pytest.raises(ValueError, match=r"^operator is not linear"):
        as_matrix(lambda x: x + 1, (3,), torch.float64)


def test_linear_measurement_keeps_what_it_got():
    A, y = normal(3, 5), normal(2, 3)
    measurement = LinearMeasurement(A, y, 0.1)
    assert measurement.matrix is A
    assert measurement.y is y
    assert measurement.noise_std == 0.1


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("matrix", {"matrix": torch.zeros(5)}),
        ("matrix", {"matrix": torch.zeros(1, 3, 5)}),
        ("y", {"y": torch.zeros(3)}),
        ("y", {"y": torch.zeros(2, 4)}),
        ("y", {"y": torch.zeros(1, 2, 3)}),
        ("noise_std", {"noise_std": 0.0}),
        ("noise_std", {"noise_std": -0.1}),
        ("noise_std", {"noise_std": math.nan}),
    ],
)
def test_linear_measurement_doors(named, change):
    given = {"matrix": torch.zeros(3, 5), "y": torch.zeros(2, 3), "noise_std": 0.1}
    with pytest.raises(ValueError, match=rf"^{named} "):
        LinearMeasurement(**{**given, **change})


def test_operators_refuse_images_that_they_do_not_fit():
    with pytest.raises(ValueError, match="not a multiple of 3"):
        average_pool(3)(torch.zeros(1, 1, 8, 8))
    mask = random_mask((4, 4), 0.5, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="expected 4 x 4"):
        mask(torch.zeros(1, 1, 2, 8))


def test_a_mask_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keeps none"):
        random_mask((4, 4), 0.99, torch.Generator().manual_seed(0))


def test_a_square_has_no_matrix():
    with pytest.raises(ValueError, match="not linear"):
        as_matrix(lambda x: x**2, (1, 2, 2), torch.float64)
