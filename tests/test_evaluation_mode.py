"""Networks are used in evaluation mode behind every door, and are left in the mode they were in."""

import pytest
import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VPSchedule
from torch import nn

import diffoc
from diffoc.costs import ClassLikelihood, GaussianLikelihood
from diffoc.experiments.class_guidance import guidance_controls
from diffoc.experiments.methods import METHODS
from diffoc.greedy import greedy_controls
from diffoc.priors import wrap, wrap_edm
from diffoc.priors.latent import LatentPrior
from diffoc.problems.operators import average_pool
from diffoc.problems.tasks import measure, random_inpainting
from diffoc.process import ReverseProcess
from diffoc.theory.guidance import conditional_rollout, tweedie_score

SHAPE = (1, 8, 8)
NOISE_STD = 0.1


class Dropping(nn.Module):
    """A network with dropout and batch norm, whose second argument changes little."""

    def __init__(self, out=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, out)
        )

    def forward(self, x, t=None, **kwargs):
        found = self.layers(x)
        return found.reshape(x.shape) if found.shape[1] == 64 else found


def seeded(make=Dropping, *args):
    torch.manual_seed(0)
    return make(*args).train()


def generator():
    return torch.Generator().manual_seed(0)


def images(count=2):
    return torch.randn(count, *SHAPE, generator=generator())


def schedule():
    return VPSchedule(alpha_min=1e-2, sigma_min=1e-2)


def prior():
    found = KarrasDenoiser(seeded(), schedule())
    found.image_shape = SHAPE
    return found


class Blind(nn.Module):
    """An autoencoder that drops what it is given in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def encode(self, x):
        return self.dropout(x)

    decode = encode


def latent():
    found = LatentPrior(prior(), Blind().train())
    found.image_shape = found.decoded_shape = SHAPE
    return found


class Severe(nn.Module):
    """A severity encoder with dropout."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, picture):
        return self.dropout(picture), 0 * self.dropout(picture).mean(dim=(1, 2, 3))


PHYSICS = random_inpainting(SHAPE, generator(), 0.5)
Y = measure(PHYSICS, images(), generator(), NOISE_STD)
FEW = diffoc.Recipe("few", steps=2, iterations=2)
PROBLEM = diffoc.Problem(PHYSICS, Y, NOISE_STD)
POOLED = average_pool(2)(images())


def solved(used, cost=None):
    cost = cost or GaussianLikelihood(PHYSICS.A, Y, NOISE_STD)
    return diffoc.solve(ReverseProcess(used, 2), cost, images(), iterations=2).x0


def by_method(name):
    def door(used, **more):
        settings = METHODS[name].settings("random_inpainting", 12) if name not in LONG else {}
        settings |= LONG.get(name, {}) | more
        if METHODS[name].tuned:
            keyword, values = next(iter(METHODS[name].tuned.items()))
            settings |= {keyword: values[1]}
        method = METHODS[name].run
        return method(used, PHYSICS, Y, images(), generator(), noise_std=NOISE_STD, **settings)

    return door


LONG = {
    "stopped": {"budget": 120},
    "ours": {"budget": 20, "steps": 5},
    "paper": METHODS["paper"].settings("random_inpainting", 1000) | {"steps": 2, "iterations": 2},
    "released": METHODS["released"].settings("random_inpainting", 1000)
    | {"steps": 3, "iterations": 2},
}
LONG["paper_tuned"] = LONG["paper"]
OF_IMAGES = [name for name, m in METHODS.items() if not m.latent and name != "deep_image_prior"]

DOORS = {
    "wrap": (seeded, lambda net: solved(wrap(net, torch.linspace(0.99, 0.01, 9), SHAPE))),
    "wrap_edm": (seeded, lambda net: solved(wrap_edm(net, SHAPE))),
    "reconstruct": (prior, lambda used: diffoc.reconstruct(PROBLEM, used, FEW).x0),
    "the guess": (
        prior,
        lambda used: greedy_controls(ReverseProcess(used, 2), PHYSICS, Y, images(), NOISE_STD),
    ),
    "solve": (prior, solved),
    "rollout": (prior, lambda used: ReverseProcess(used, 2).rollout(images())),
    "Reconstructor": (
        lambda: diffoc.Reconstructor(prior(), FEW, NOISE_STD).train(),
        lambda model: model(Y, PHYSICS),
    ),
    "physics": (
        lambda: seeded(Dropping, 16),
        lambda net: (
            diffoc.reconstruct(
                diffoc.Problem(net, POOLED.flatten(1), NOISE_STD), prior().eval(), FEW
            ).x0
        ),
    ),
    "the operator of a cost": (
        lambda: seeded(Dropping, 16),
        lambda net: solved(prior().eval(), GaussianLikelihood(net, POOLED.flatten(1), NOISE_STD)),
    ),
    "a cost": (
        lambda: seeded(nn.Sequential, Dropping(1), nn.Flatten(0)),
        lambda net: solved(prior().eval(), net),
    ),
    "a classifier": (
        lambda: seeded(Dropping, 10),
        lambda net: solved(prior().eval(), ClassLikelihood(net, torch.tensor([3]))),
    ),
    "guidance": (
        lambda: nn.ModuleList([prior(), seeded(Dropping, 10)]),
        lambda nets: guidance_controls(
            ReverseProcess(nets[0], 2), ClassLikelihood(nets[1], torch.tensor([3])), images()
        )[1],
    ),
    "scores": (
        prior,
        lambda used: conditional_rollout(
            ReverseProcess(used, 2),
            tweedie_score(used, GaussianLikelihood(PHYSICS.A, Y, NOISE_STD)),
            images(),
        ),
    ),
    **{name: (prior, by_method(name)) for name in OF_IMAGES},
    "psld": (latent, by_method("psld")),
    "flash_diffusion": (
        lambda: nn.ModuleList([latent(), Severe().train()]),
        lambda nets: by_method("flash_diffusion")(nets[0], encoder=nets[1]),
    ),
}
UNUSED = "deep_image_prior"  # makes a network of its own


def test_every_method_is_a_door():
    assert set(METHODS) - set(DOORS) == {UNUSED}


@pytest.mark.parametrize("name", DOORS)
def test_a_network_in_training_mode_gives_what_it_gives_in_evaluation(name):
    make, door = DOORS[name]
    network, found = make(), []
    for seed in range(2):  # of dropout's masks
        torch.manual_seed(seed)
        found.append(door(network))
    if "wrap" not in name:
        assert all(module.training for module in network.modules())
    expected = door(make().eval())
    assert expected.isfinite().all()
    assert all(torch.equal(image, expected) for image in found)


@pytest.mark.parametrize("name", ["solve", "reconstruct", "rollout"])
def test_the_mode_comes_back_after_an_error(name):
    make, door = DOORS[name]
    network = make()
    network.backbone.layers[1].eval()  # as those who fine-tune with frozen statistics have it
    before = [module.training for module in network.modules()]
    door(network)
    assert [module.training for module in network.modules()] == before
    network.backbone.layers[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        DOORS["solve"][1](network)
    assert [module.training for module in network.modules()] == before
