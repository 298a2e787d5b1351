"""Pretrained priors, each against the library that its weights were made for."""

import json
import pickle
from functools import partial

import pytest
import torch
from azula.noise import VESchedule, VPSchedule
from azula.plugins import adm
from azula.plugins.utils import load_cards
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from diffoc.priors import pretrained, wrap
from diffoc.priors.networks import DigitClassifier, parameter_count
from diffoc.priors.pipelines import DiffusersDenoiser
from diffoc.priors.pretrained import (
    EDMDenoiser,
    load_prior,
    take_nearest_timesteps,
    untrained_adm,
)
from diffoc.training import trainer as training


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def randomize(network, seed=0):
    """Weights without the zeros that a fresh diffusion network has in its last layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_ffhq_network_of_the_paper_at_full_size(cache):
    """Saved under the original names, it comes back with the variance cut off."""
    config = load_cards(adm)["ffhq_256x256"].config
    original = adm.make_model(**config, clip_mean=False, learn_var=True)
    randomize(original.backbone)
    state = original.backbone.state_dict()
    assert parameter_count(original.backbone) == pytest.approx(93.56e6, rel=1e-4)
    names = {
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.0.weight",
        "middle_block.1.qkv.weight",
        "output_blocks.11.0.out_layers.3.weight",
        "out.2.weight",
    }
    assert names <= state.keys()
    assert state["out.2.weight"].shape[0] == 6
    torch.save(state, cache / "ffhq_10m.pt")
    schedule = VPSchedule(alpha_min=1e-2, sigma_min=1e-2)
    prior = load_prior("ffhq256", schedule)
    assert prior.backbone.out[2].weight.shape[0] == 3
    # The weights are what is compared, and they meet a smaller image in a tenth of the time.
    x, t = noise(1, 3, 64, 64), torch.tensor(0.6)
    original.schedule = schedule
    take_nearest_timesteps(original)
    with torch.no_grad():
        expected, found = original.eval()(x, t).mean, prior(x, t).mean
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "schedule", [VESchedule(1e-3, 50), VESchedule(0.02, 500), VPSchedule(1e-3, 1e-3)]
)
def test_an_adm_network_is_used_where_it_was_trained(schedule, cache, monkeypatch):
    """Of DDPM's betas, which its code has: elsewhere azula takes the first or the last timestep."""
    small = partial(untrained_adm, channels=32)
    monkeypatch.setattr(pretrained, "untrained_adm", small)
    torch.save(small("ffhq256").backbone.state_dict(), cache / "ffhq_10m.pt")
    bar = DDPMScheduler(1000).alphas_cumprod.double()
    least, most = (1 / bar[[0, -1]] - 1).sqrt().tolist()
    with pytest.raises(ValueError, match=f"trained from {least:.3g} to {most:.3g}: leave schedule"):
        load_prior("ffhq256", schedule)
    load_prior("ffhq256", VESchedule(least, most))
    load_prior("ffhq256")


def test_adm_files_of_another_kind_are_refused(cache):
    torch.save({"weight": torch.zeros(3)}, cache / "ffhq_10m.pt")
    with pytest.raises(ValueError, match=r"ffhq_10m\.pt holds another network"):
        load_prior("ffhq256")
    (cache / "ffhq_10m.pt").write_bytes(b"<html>Quota exceeded</html>")
    with pytest.raises(ValueError, match=r"ffhq_10m\.pt is damaged"):
        load_prior("ffhq256")


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_file_of_tensors_runs_code(cache, tmp_path):
    for path, name in ((cache / "ffhq_10m.pt", "ffhq256"), (tmp_path / "a.pt", tmp_path / "a.pt")):
        torch.save({"average": Touch(tmp_path / "touched")}, path)
        with pytest.raises(ValueError, match="damaged or no"):
            load_prior(name)
    assert not (tmp_path / "touched").exists()


class Preconditioned(nn.Module):
    """The interface of a network of Karras et al.: D(x; sigma)."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def test_edm_pickles_need_consent(cache):
    path = cache / "edm-ffhq-64x64-uncond-vp.pkl"
    path.write_bytes(pickle.dumps({"ema": Preconditioned()}))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_prior("ffhq64")
    prior = load_prior("ffhq64", allow_pickle=True)
    x = noise(2, 3, 8, 8)
    # For x_0 ~ N(0, 1) the estimate is alpha x / (alpha^2 + sigma^2), whatever the schedule.
    for t in (torch.tensor(0.3), torch.tensor([0.3, 0.8])):
        alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in prior.schedule(t))
        expected = alpha * x / (alpha**2 + sigma**2)
        torch.testing.assert_close(prior(x, t).mean, expected)


def test_edm_without_its_modules_says_what_to_clone(cache):
    path = cache / "edm-ffhq-64x64-uncond-vp.pkl"
    path.write_bytes(b"cno_such_module\nthing\n.")
    with pytest.raises(FileNotFoundError, match="NVlabs/edm"):
        load_prior("ffhq64", allow_pickle=True)
    path.write_bytes(b"half a fil")
    with pytest.raises(ValueError, match="damaged"):
        load_prior("ffhq64", allow_pickle=True)


def small_unet(**changes):
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return randomize(UNet2DModel(**{**settings, **changes}))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_models_agree_with_their_scheduler(kind, tmp_path):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    DDPMPipeline(small_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    prior = load_prior(tmp_path / "pipeline")
    assert isinstance(prior, DiffusersDenoiser)
    assert prior.image_shape == (1, 8, 8)
    network = UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet")
    scheduler.set_timesteps(1000)
    x = noise(2, 1, 8, 8)
    for step in (0, 1, 17, 500, 998, 999):
        bar = scheduler.alphas_cumprod[step].double()
        alpha, sigma = bar.sqrt().float(), (1 - bar).sqrt().float()
        # A schedule that is at this noise level, but not at its scale.
        prior.schedule = lambda t, a=alpha, s=sigma: (3 * a, 3 * s)
        with torch.no_grad():
            expected = scheduler.step(network(x, step).sample, step, x).pred_original_sample
            found = prior(3 * x, torch.tensor(0.5)).mean
        scale = expected.abs().max()
        assert (found - expected).abs().max() / scale < 1e-5, step


def test_a_wrapped_network_is_the_prior_that_its_folder_is_loaded_as(tmp_path):
    network, scheduler = small_unet(), DDPMScheduler()
    DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    x, t = noise(2, 1, 8, 8), torch.tensor(0.5)
    prior = wrap(lambda x, i: network(x, i).sample, scheduler.alphas_cumprod, (1, 8, 8))
    torch.testing.assert_close(prior(x, t).mean, load_prior(tmp_path)(x, t).mean)


def test_timesteps_between_two_are_in_between():
    bar = DDPMScheduler().alphas_cumprod
    prior = DiffusersDenoiser(small_unet(), bar, "epsilon")
    snr = (bar.double() / (1 - bar.double())).log()
    torch.testing.assert_close(prior.timestep(snr), torch.arange(1000.0).double())
    halfway = prior.timestep((snr[10] + snr[11]) / 2)
    assert halfway.item() == pytest.approx(10.5)
    ends = prior.timestep(torch.tensor([100.0, -100.0]).double())
    assert ends.tolist() == [0, 999]


def test_times_of_a_batch_are_its_images_own(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    prior = load_prior(tmp_path / "pipeline")
    x, t = noise(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        together = prior(x, t).mean
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], prior(x[i : i + 1], t[i]).mean)


def test_a_learned_variance_of_diffusers_is_cut_off(tmp_path):
    network = small_unet(out_channels=2)
    DDPMPipeline(network, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    prior = load_prior(tmp_path)
    x, t = noise(1, 1, 8, 8), torch.tensor(0.5)
    alpha, sigma = prior.schedule(t)
    scale = torch.rsqrt(alpha**2 + sigma**2)
    with torch.no_grad():
        step = prior.timestep((alpha / sigma).square().log().reshape(1)).float()
        epsilon = network(scale * x, step).sample[:, :1]
        assert prior(x, t).mean.shape == x.shape
        torch.testing.assert_close(prior(x, t).mean, (x - sigma * epsilon) / alpha)


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_diffusers_models_that_are_no_priors_are_refused(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    unet, scheduler = tmp_path / "unet" / "config.json", tmp_path / "scheduler"
    edit(unet, _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        load_prior(tmp_path)
    edit(unet, _class_name="UNet2DModel", num_class_embeds=10)
    with pytest.raises(ValueError, match="conditional network, num_class_embeds"):
        load_prior(tmp_path)
    edit(unet, num_class_embeds=None)
    (scheduler / "scheduler_config.json").write_text('{"_class_name": "ScoreSdeVeScheduler"}')
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler"):
        load_prior(tmp_path)


def test_damaged_folders_name_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_prior(tmp_path)
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        load_prior(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_prior(tmp_path)


def test_the_hub_offline_says_what_to_fetch(cache):
    with pytest.raises(FileNotFoundError) as caught:
        load_prior("1aurent/mnist-28")
    for part in ("1aurent/mnist-28", "https://huggingface.co/1aurent/mnist-28", str(cache)):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["mnsit", "", "../elsewhere", "a/b/c", "/"])
def test_unknown_names_are_listed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "/":  # a folder, without a model
        with pytest.raises(FileNotFoundError):
            load_prior(name)
    else:
        with pytest.raises(ValueError, match="name_or_path"):
            load_prior(name)


def test_checkpoints_of_the_trainer_are_priors(tmp_path):
    run = training.start(training.PLANS["mnist"])
    randomize(run.average)
    training.save(run, tmp_path / "run.pt")
    prior = load_prior(tmp_path / "run.pt", VESchedule(2e-3, 80))
    x, t = noise(2, 1, 28, 28), torch.tensor(0.5)
    with torch.no_grad():
        expected = training.denoiser(run.average)(x, t).mean
        torch.testing.assert_close(prior(x, t).mean, expected)
    training.save(training.start(training.Plan(DigitClassifier, images=1)), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="another network"):
        load_prior(tmp_path / "c.pt")
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        load_prior(tmp_path / "missing.pt")


def test_edm_denoiser_is_exported_for_other_networks():
    prior = EDMDenoiser(Preconditioned(), VESchedule(1e-2, 10))
    assert prior(noise(1, 1, 4, 4), torch.tensor(0.0)).mean.shape == (1, 1, 4, 4)
