"""A batch whose images have an operator each, against the same images with one for all."""

import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics

from diffoc.baselines.decomposition import decompose
from diffoc.data import digits
from diffoc.problems.tasks import TASKS, for_each, parts_of, task

SHAPE = (1, 28, 28)


def parts(name, count=3):
    return [task(name, SHAPE, torch.Generator().manual_seed(i)) for i in range(count)]


def one_by_one(maps, x):
    return torch.cat([f(x[i : i + 1]) for i, f in enumerate(maps)])


@pytest.mark.parametrize("name", TASKS)
def test_each_image_has_its_operator(name):
    singles, x = parts(name), digits()[0][:3]
    together = for_each(singles)
    torch.testing.assert_close(together.A(x), one_by_one([p.A for p in singles], x))
    assert isinstance(together, Inpainting) == name.endswith("inpainting")
    assert isinstance(together, LinearPhysics) == isinstance(singles[0], LinearPhysics)
    if isinstance(together, LinearPhysics):
        y = together.A(x)
        back = one_by_one([p.A_adjoint for p in singles], y)
        torch.testing.assert_close(together.A_adjoint(y), back)
        svd = decompose(together, x)
        torch.testing.assert_close(svd.A(x), y, atol=1e-5, rtol=1e-4)


class Turned(LinearPhysics):
    """A linear operator that nothing else knows of."""

    def __init__(self, turns):
        super().__init__()
        self.register_buffer("turns", torch.tensor(turns))

    def A(self, x, **_):
        return x.rot90(self.turns.item(), (2, 3))

    def A_adjoint(self, y, **_):
        return y.rot90(-self.turns.item(), (2, 3))


def test_an_operator_of_one_s_own_can_differ_by_image():
    singles, x = [Turned(i) for i in (0, 1, 3)], digits()[0][:3]
    physics = for_each(singles)
    y = physics.A(x)
    torch.testing.assert_close(y, one_by_one([p.A for p in singles], x))
    torch.testing.assert_close(physics.A_adjoint(y), x)
    assert parts_of(physics) == singles
    with pytest.raises(ValueError, match="x has 2 images, expected 3"):
        physics.A(x[:2])
