"""The whole pipeline on another device, without one: on fake tensors that only know where they are.

The device is a CUDA one where there is one. Elsewhere autograd refuses backward passes on fake CUDA
tensors, because it asks the driver for its streams, and "lazy", the one kind of device whose
backward passes need no driver, stands in: that a tensor was left on the CPU shows all the same.

Fake tensors have no values, but control flow needs some ("is the cost finite?"). The values are
those of the same run on real tensors of the CPU, recorded first and replayed in the same order.
"""

import copy
from dataclasses import replace

import pytest
import torch
from azula.denoise import Denoiser, GaussianPosterior, KarrasDenoiser
from azula.noise import VPSchedule
from deepinv.physics import LinearPhysics
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from diffoc.baselines.paper import snr_weights
from diffoc.costs import GaussianLikelihood
from diffoc.experiments import cells as experiments
from diffoc.experiments import ffhq
from diffoc.experiments.benchmark import LiveTensors
from diffoc.experiments.protocol import FFHQ
from diffoc.experiments.records import as_json
from diffoc.lowrank import MatrixFree
from diffoc.priors.networks import UNetBackbone
from diffoc.priors.pretrained import untrained_adm
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess, draw_noise
from diffoc.rules import Adam, LineSearch, Tikhonov
from diffoc.solve import solve

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "lazy:0")


class Decisions(TorchFunctionMode):
    """Records what Python reads from tensors, and shapes that depend on values, or replays them."""

    def __init__(self, recorded=None):
        super().__init__()
        self.log = [] if recorded is None else list(recorded)
        self.replaying = recorded is not None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        is_value = name in (
            "item",
            "tolist",
            "__bool__",
            "__float__",
            "__int__",
            "equal",
            "allclose",
        )
        is_shape = name == "nonzero" or (
            name == "__getitem__"
            and isinstance(args[1], torch.Tensor)
            and args[1].dtype == torch.bool
        )
        if not (is_value or is_shape):
            return func(*args, **(kwargs or {}))
        if self.replaying:
            expected, result = self.log.pop(0)
            assert name == expected, "the two runs took different ways"
            if is_shape:
                dtype = torch.int64 if name == "nonzero" else args[0].dtype
                return args[0].new_empty(result, dtype=dtype)
            return result
        result = func(*args, **(kwargs or {}))
        if name == "tolist":  # which a fake tensor does item by item
            self.log += [("item", each.item()) for each in args[0].flatten()]
        else:
            self.log.append((name, result.shape if is_shape else result))
        return result


def small_network(channels=1):
    network = UNetBackbone((8, 16), (1, 1), fold=2, in_channels=channels, features=8)
    return KarrasDenoiser(network, VPSchedule()).eval().requires_grad_(False)


class WithVariance(Denoiser):
    """A prior that has a variance for each pixel, as the released code's has."""

    def __init__(self, prior):
        super().__init__()
        self.prior, self.schedule, self.image_shape = prior, prior.schedule, prior.image_shape

    def forward(self, x_t, t, **kwargs):
        mean = self.prior(x_t, t).mean
        return GaussianPosterior(mean, torch.full_like(mean, 0.5))


def pipeline(
    device,
    rank,
    rule,
    keep,
    method="ddim",
    misplaced=None,
    prior=small_network,
    shape=(1, 8, 8),
    iterations=3,
    steps=3,
):
    """What a user writes, with everything on one device but what is misplaced."""

    def place(what, tensor):
        return tensor.to("cpu" if what == misplaced else device)

    with torch.device(device):
        prior = prior()
    channels, height, width = shape
    g = torch.Generator().manual_seed(0)
    noise = place("noise", draw_noise(steps, (2, *shape), g)) if method == "ddpm" else None
    process = ReverseProcess(prior, steps, method, noise=noise)
    x = process.initial_state((2, *shape), g).float().to(device)
    y = place("y", torch.zeros(2, channels, height // 2, width // 2))
    operator = average_pool(2)
    found = solve(
        process,
        GaussianLikelihood(operator, y, 0.5),
        x,
        control_cost=1e-2 * snr_weights(prior.schedule, process.times)[0].item(),
        rank=rank,
        rule=rule,
        regularization=Tikhonov() if isinstance(rule, LineSearch) else 1.0,
        iterations=iterations,
        derivatives=MatrixFree(keep_activations=keep),
        stop=lambda x0: (operator(x0) - y).flatten(1).square().mean(1) < 1e-6,
    )
    return [found.x0, found.controls, found.states, found.cost, found.costs, found.terminal_costs]


def on_fake_device(prior=small_network, shape=(1, 8, 8), **options):
    """The pipeline's results there; the decisions are those of a small network."""
    torch.manual_seed(0)
    with Decisions() as decisions:
        small = {"prior": lambda: small_network(shape[0]), "shape": (shape[0], 8, 8)}
        pipeline("cpu", **{**options, **small, "misplaced": None})
    options.update(prior=prior, shape=shape)
    with FakeTensorMode(allow_non_fake_inputs=True), Decisions(decisions.log) as replayed:
        result = pipeline(DEVICE, **options)
    assert not replayed.log
    return result


# Every two of rank, rule and activations; three trials, because more of them meet no other line.
@pytest.mark.parametrize(
    ("rank", "rule", "keep", "method"),
    [
        (0, Adam(0.05), True, "ddim"),
        (0, LineSearch(trials=3), False, "ddim"),
        (1, Adam(0.05), False, "ddpm"),
        (1, LineSearch(trials=3), True, "ddpm"),
    ],
)
def test_everything_stays_on_the_device(rank, rule, keep, method):
    for tensor in on_fake_device(rank=rank, rule=rule, keep=keep, method=method):
        assert tensor.device == DEVICE
        assert tensor.dtype == torch.float32


def test_the_network_of_the_paper_at_full_size():
    """93.56 M parameters and two images of 256 x 256: two iterations of rank 1 on two steps."""
    with LiveTensors() as tensors:
        found = on_fake_device(
            rank=1,
            rule=Adam(),
            keep=False,  # as it has to be run: the activations of all steps fit nowhere
            prior=lambda: untrained_adm("ffhq256"),
            shape=(3, 256, 256),
            iterations=2,
            steps=2,
        )
    # An image's activations are 434 million numbers of four bytes a step: 3.5 GB, once.
    most = tensors.peak - 4 * 93.56e6
    assert 3.4e9 < most < 5e9
    assert found[0].shape == (2, 3, 256, 256)
    assert found[2].shape == (3, 2, 3, 256, 256)
    for tensor in found:
        assert tensor.device == DEVICE
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("misplaced", ["y", "noise"])
def test_what_is_on_another_device_is_found(misplaced):
    with pytest.raises(ValueError, match=rf"{misplaced} .*cpu"):
        on_fake_device(rank=1, rule=Adam(), keep=True, method="ddpm", misplaced=misplaced)


@pytest.mark.parametrize("task", ffhq.TASKS)
def test_cells_of_the_ffhq_tables_stay_on_the_device(task, monkeypatch):
    """Every method of Table 1, two cells one after the other: the second finds all as the first."""
    shape = (3, 16, 16)
    images = dict(zip("ab", 2 * torch.rand(2, 1, *shape) - 1, strict=True))
    cached = experiments._operator
    copies = []

    def operator(*drawn):
        *which, device = drawn
        with unset_fake_temporarily():
            made = copy.deepcopy(cached(*which, "cpu"))
        copies.append(made.to(device))
        return made

    generator = experiments._generator
    monkeypatch.setattr(experiments, "_operator", operator)
    monkeypatch.setattr(experiments, "_generator", lambda *what, device="": generator(*what))
    monkeypatch.setattr(experiments, "digest", lambda what: "digest")
    monkeypatch.setattr(experiments, "read_images", lambda names, *_: images[names[0]])
    monkeypatch.setattr(experiments, "clock", lambda device: 0.0)
    monkeypatch.setattr(  # deepinv's draws on the device itself
        LinearPhysics, "compute_sqnorm", lambda self, x, **_: x.flatten()[0] * 0 + 1
    )
    cached(FFHQ, task, shape, 0, "digest", "cpu")  # a kernel is drawn number by number
    network = small_network(3)
    network.image_shape = shape

    def load_once(name, device, learned_variance=False):
        with unset_fake_temporarily():
            own = copy.deepcopy(network)
        return (WithVariance(own) if learned_variance else own).to(device), "weights"

    monkeypatch.setattr(experiments, "load_once", load_once)
    cells = ffhq.cells_by_line("table1", "ffhq256", "ab", 1, "float32", tasks=[task], smallest=True)
    methods = sorted({cell.method for cell in cells})
    assert len(methods) == 9
    if task != "motion_blur":  # of the other tasks every second method, to take half as long
        methods = methods[ffhq.TASKS.index(task) % 2 :: 2]
    for method in methods:
        two = [cell for cell in cells if cell.method == method][:2]
        if method == "admm_tv":  # its steps cost no evaluation, so that a rehearsal has them all
            two = [replace(cell, settings=as_json({"steps": 2})) for cell in two]
        with Decisions() as decisions:
            for cell in two:
                experiments.Computer()(cell)
        with FakeTensorMode(allow_non_fake_inputs=True), Decisions(decisions.log) as replayed:
            for cell in two:
                _, x0 = experiments.Computer(device=str(DEVICE))(cell)
        assert not replayed.log
        assert x0.device.type == "cpu"
    devices = {buffer.device for one in copies for buffer in one.buffers()}
    assert devices <= {DEVICE, torch.device("cpu")}
