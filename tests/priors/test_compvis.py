"""CompVis's checkpoint of the latent model of FFHQ, against their own code with random weights.

The fixture has the names and shapes of the state of their `LatentDiffusion`, made from
`models/ldm/ffhq256/config.yaml` but for narrower networks (32 channels each) and 64 codewords, and
what it returned in evaluation mode, with averaged weights, for the weights and inputs below.
"""

import pickle
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffoc.priors.compvis import alphas_cumprod
from diffoc.priors.latent import LatentPrior
from diffoc.priors.pretrained import load_prior

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures" / "compvis.npz")
SHAPES = {
    str(name): tuple(map(int, str(shape).split()))
    for name, shape in zip(FIXTURE["names"], FIXTURE["shapes"], strict=True)
}
RANDOM = ("first_stage_model.", "model_ema.diffusion", "model.diffusion")


def random_weights():
    """All that is trained, in the order of the names; other numbers of the state are zero."""
    draw = np.random.RandomState(0)
    state = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for name in sorted(name for name in SHAPES if name.startswith(RANDOM)):
        shape = SHAPES[name]
        values = draw.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            values = 0.1 * values + (1 if name.endswith("weight") else 0)
        else:
            values = values / np.float32(max(1, np.prod(shape[1:]))) ** 0.5
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    return state


@pytest.fixture(scope="module")
def state():
    return random_weights()


class ModelCheckpoint:
    """As Lightning's own: the class is a key of a checkpoint, and an object of it a value."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a state as Lightning writes it, where its class cannot be imported, and loads it."""
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path))
    monkeypatch.setattr(ModelCheckpoint, "__module__", __name__)

    def load(state, **more):
        callbacks = {ModelCheckpoint: {"monitor": "val/loss", "itself": ModelCheckpoint()}}
        content = {"epoch": 3, "state_dict": OrderedDict(state), "callbacks": callbacks, **more}
        torch.save(content, tmp_path / "ffhq256_latent.ckpt")
        return load_prior("ffhq256_latent")

    return load


def inputs():
    draw = np.random.RandomState(1)
    z = draw.standard_normal((1, 3, 8, 8)).astype(np.float32)
    x = draw.uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)
    return torch.from_numpy(z), torch.from_numpy(x)


def test_outputs_are_those_of_their_code(load, state):
    prior, (z, x) = load(state), inputs()
    assert isinstance(prior, LatentPrior)
    assert (prior.image_shape, prior.decoded_shape) == ((3, 64, 64), (3, 256, 256))
    for i in (0, 1, 500, 999):
        noise = torch.from_numpy(FIXTURE[f"eps_{i}"])
        found = prior.denoiser.backbone(z, torch.tensor([float(i)])).sample
        torch.testing.assert_close(found, noise, rtol=0, atol=1e-4)
        # x_0 at the level of the timestep, by the noise.
        bar = alphas_cumprod()[i]
        scales = (bar.sqrt().float(), (1 - bar).sqrt().float())
        prior.denoiser.schedule = lambda t, scales=scales: scales
        expected = (z - scales[1] * noise) / scales[0]
        error = (prior(z, torch.tensor(0.5)).mean - expected).abs().max()
        assert error < 1e-4 * expected.abs().max(), i
    # Whatever lies between two codewords is far from either: no rounding chooses another.
    for found, name in ((prior.encode(x), "encoded"), (prior.decode(z), "decoded")):
        torch.testing.assert_close(found, torch.from_numpy(FIXTURE[name]), rtol=0, atol=1e-3)


def test_levels_are_those_of_diffusers_scheduler():
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    expected = DDPMScheduler(1000, **betas).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod().float(), expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_without_averages_has_the_network_itself(load, state):
    averaged = {name: v for name, v in state.items() if not name.startswith("model_ema.")}
    for name in averaged:
        if name.startswith("model.diffusion_model."):
            averaged[name] = state[f"model_ema.{name.removeprefix('model.').replace('.', '')}"]
    z, _ = inputs()
    found = load(averaged).denoiser.backbone(z, torch.tensor([500.0])).sample
    expected = torch.from_numpy(FIXTURE["eps_500"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def touch(path):
    path.touch()


class Touches:
    """Its pickle calls a function, or a method by its name, which takes two calls."""

    def __init__(self, path, how):
        self.path, self.how = path, how

    def __reduce__(self):
        return self.how, (self.path,)


@pytest.mark.parametrize("how", [touch, Path.touch])
def test_no_code_in_it_is_run(load, state, tmp_path, how):
    touched = tmp_path / "touched"
    with nullcontext() if how is touch else pytest.raises(ValueError, match="damaged"):
        load(state, hparams=Touches(touched, how))
    assert not touched.exists()
    pickle.loads(pickle.dumps(Touches(touched, how)))  # what it would do
    assert touched.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {"x": torch.zeros(1)}, "no checkpoint of latent-diffusion"),
        (
            lambda state: state | {"first_stage_model.quantize.embedding.weight": 3},
            "no quantize",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "input_blocks.1.0" not in k},
            "holds another network: input_blocks.1.0",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "decoder.conv_out" not in k},
            "holds another network: decoder.conv_out",
        ),
    ],
)
def test_another_file_is_refused(load, state, change, says):
    with pytest.raises(ValueError, match=says) as raised:
        load(change(state))
    assert "ffhq256_latent.ckpt" in str(raised.value)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path))
    (tmp_path / "ffhq256_latent.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        load_prior("ffhq256_latent")
    torch.save([1], tmp_path / "ffhq256_latent.ckpt")
    with pytest.raises(ValueError, match="no file of named tensors"):
        load_prior("ffhq256_latent")
