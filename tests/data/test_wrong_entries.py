"""Every entry of the files that are read, taken away or spoilt: one line names the file."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from diffoc.data import manifest
from diffoc.data.downloads import read_torch_file
from diffoc.experiments.methods import read_tuned
from diffoc.priors.autoencoder import Autoencoder
from diffoc.priors.networks import DigitClassifier
from diffoc.priors.pipelines import CONDITIONS, UNSEEN, alphas_cumprod_of
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import load_shipped, read_checkpoint, read_weights, write_weights
from diffoc.training import trainer as training

ONE_LINE = (ValueError, FileNotFoundError)
OTHERS = ("text", 3, -1, 2.5, True, None, [], {}, [1], {"a": 1}, float("nan"))
"""What may stand in a JSON file in place of an entry."""


def refused(read, file):
    """Whether a file is refused, by an error of one kind that names it; anything else raises."""
    try:
        read()
    except ONE_LINE as error:
        assert file in str(error), f"{file} is not in: {error}"  # noqa: PT017  both may happen
        return True
    return False


def spoilt_tensors(state):
    """Named tensors without one, with one too many, and with each spoilt in some way."""
    yield state | {"more": torch.zeros(2)}
    for name in [*state][:2] + [*state][-2:]:
        value = state[name]
        yield {key: kept for key, kept in state.items() if key != name}
        yield state | {name: torch.zeros(7, 7, 7)}
        if value.is_floating_point():
            yield state | {name: torch.full_like(value, torch.nan)}
            yield state | {name: torch.zeros(value.shape, dtype=torch.int64)}


def cut(content):
    return [content[:size] for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1)]


def test_manifests(tmp_path):
    (tmp_path / "a").write_text("what is registered")
    manifest.register_file("a", "license", "source", tmp_path)
    path = tmp_path / "manifest.json"
    whole, entries = path.read_bytes(), json.loads(path.read_text())

    def is_refused(content):
        path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
        return refused(lambda: manifest.checked_bytes("a", tmp_path), "manifest.json") or (
            isinstance(content, bytes)
        )

    for key, good in entries["a"].items():
        assert is_refused(json.dumps({"a": {k: v for k, v in entries["a"].items() if k != key}}))
        for wrong in OTHERS:
            if type(wrong) is not type(good):
                assert is_refused(json.dumps({"a": entries["a"] | {key: wrong}}))
    for wrong in OTHERS:
        if wrong != {}:
            assert is_refused(json.dumps({"a": wrong}))
        assert is_refused(json.dumps(wrong))
    for part in cut(whole)[:-1]:
        path.write_bytes(part)
        assert refused(lambda: manifest.checked_bytes("a", tmp_path), "manifest.json")
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            manifest.register_file("a", "license", "source", tmp_path)
        assert path.read_bytes() == part
    path.write_bytes(b"\xff\xfe" + whole)
    assert refused(lambda: manifest.checked_bytes("a", tmp_path), "manifest.json")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("classifier", DigitClassifier),
        ("faces64_autoencoder", Autoencoder),
    ],
)
def test_weights_that_are_registered_but_wrong(name, make, tmp_path):
    """Whoever trains anew registers what came out: the checksum says nothing then."""
    path = write_weights(make(), name, tmp_path)
    whole, state = path.read_bytes(), load_file(path)
    load_shipped(make, name, tmp_path)

    def is_refused():
        manifest.register_file(path.name, "license", "source", tmp_path)
        return refused(lambda: load_shipped(make, name, tmp_path), path.name)

    for wrong in spoilt_tensors(state):
        save_file(wrong, path)
        assert is_refused()
    for part in cut(whole):
        path.write_bytes(part)
        assert is_refused()
        assert refused(lambda: read_weights(path), path.name)


PLAN = training.Plan(DigitClassifier, images=8, batch=4)


def test_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    run = training.start(PLAN, 0)
    training.save(run, path)
    whole, state = path.read_bytes(), read_torch_file(path)
    training.resume(PLAN, path)

    def is_refused(wrong):
        torch.save(wrong, path)
        return refused(lambda: training.resume(PLAN, path), "a.pt")

    for key in state:
        assert is_refused({name: value for name, value in state.items() if name != key})
        for wrong in ("text", None, [], torch.zeros(()), {"a": torch.zeros(3)}, True):
            assert is_refused(state | {key: wrong}), (key, wrong)
    for key in ("network", "average"):
        for wrong in spoilt_tensors(state[key]):
            assert is_refused(state | {key: wrong})
    for part in cut(whole):
        path.write_bytes(part)
        assert refused(lambda: read_checkpoint(path), "a.pt")
        assert refused(lambda: load_prior(path), "a.pt")


def test_tuned_values(tmp_path):
    """Each level of nesting, with each kind of thing in its place."""
    path = tmp_path / "tuned.json"
    whole = {"faces64": {"dps": {"motion_blur": {"300": {"guidance": 1.0, "steps": 3}}}}}
    path.write_text(json.dumps(whole))
    assert read_tuned(path) == whole
    for depth in range(6):
        for wrong in OTHERS:
            fine = [{}, {"a": 1}] if depth == 4 else ["text", 3, -1, 2.5, True]
            if wrong == {} if depth < 4 else wrong in fine:
                continue  # nothing was tuned, or a value
            found = wrong
            for key in ["faces64", "dps", "motion_blur", "300", "guidance"][:depth][::-1]:
                found = {key: found}
            path.write_text(json.dumps(found))
            assert refused(lambda: read_tuned(path), "tuned.json"), (depth, wrong)
    path.write_text(json.dumps({"faces64": {"dps": {"motion_blur": {"many": {"guidance": 1.0}}}}}))
    assert refused(lambda: read_tuned(path), "tuned.json")
    for content in ("{", "", "\x00"):
        path.write_text(content)
        assert refused(lambda: read_tuned(path), "tuned.json")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline with an untrained network."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(
        8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 32), **blocks
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize("file", [UNET, SCHEDULER])
def test_settings_of_diffusers(file, pipeline, tmp_path):
    """An entry of another type is refused at loading, or diffusers can do with it.

    Of four wrong values each entry has every other one.
    """
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    path = folder / file
    whole, settings = path.read_bytes(), json.loads(path.read_text())
    x, t = torch.ones(1, 1, 8, 8), torch.tensor(0.5)
    expected = load_prior(folder)(x, t).mean
    for i, (key, good) in enumerate(settings.items()):
        for wrong in ("text", [1], None, 0.25)[i % 2 :: 2]:
            if type(wrong) is type(good) or good is None:
                continue  # another value of the kind is another model
            path.write_text(json.dumps(settings | {key: wrong}))
            refused(lambda: load_prior(folder)(x, t).mean, path.parent.name)
    for part in cut(whole)[:-1]:
        path.write_bytes(part)
        assert refused(lambda: load_prior(folder), path.name)
    path.write_bytes(whole)
    torch.testing.assert_close(load_prior(folder)(x, t).mean, expected)


@pytest.fixture(scope="module")
def latent_pipeline(tmp_path_factory):
    """One of latents, whose network takes as many channels as it makes."""
    folder = tmp_path_factory.mktemp("saved") / "latents"
    small = {"block_out_channels": (32,), "layers_per_block": 1}
    AutoencoderKL(**small).save_pretrained(folder / "vae")
    types = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(8, 4, 4, **small, **types).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    assert load_prior(folder).image_shape == (4, 8, 8)
    return folder


VAE = "vae/config.json"
KINDS = {UNET: "UNet2DModel", VAE: "AutoencoderKL"}
OTHER_NETWORKS = [
    *((file, {key: None}, key) for file in (UNET, VAE) for key in UNSEEN[KINDS[file]]),
    *((UNET, {key: 8}, f"conditional network, {key} is 8") for key in CONDITIONS[:1]),
    (UNET, {"class_embed_type": "timestep"}, "conditional network, class_embed_type"),
    *((UNET, {key: 8}, key) for key in CONDITIONS[2:]),
    (UNET, {"norm_groups": 4}, "setting norm_groups"),
    (UNET, {"in_channels": 9}, "damaged"),
    (VAE, {"latents_mean": [0.0] * 4}, "latents_mean"),
    (VAE, {"unknown": 1}, "setting unknown"),
    (VAE, {"latent_channels": 3}, "damaged"),
    (SCHEDULER, {"_class_name": "UNet2DModel"}, "scheduler has the scheduler UNet2DModel"),
    (SCHEDULER, {"_class_name": None}, "scheduler has the scheduler None"),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no attribute|betas"),
    (SCHEDULER, {"prediction_type": "flow"}, "prediction_type 'flow'"),
]
"""What would load without a word as another network than was trained; None takes a key away."""


@pytest.mark.parametrize(("file", "changes", "said"), OTHER_NETWORKS)
def test_settings_of_another_network_are_refused(file, changes, said, latent_pipeline, tmp_path):
    folder = shutil.copytree(latent_pipeline, tmp_path / "pipeline")
    settings = json.loads((folder / file).read_text()) | changes
    if None in changes.values():
        del settings[next(iter(changes))]
    (folder / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=said) as caught:
        load_prior(folder)
    assert file.split("/")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_of_more_than_latents_is_refused(latent_pipeline, pipeline, tmp_path):
    folder = shutil.copytree(latent_pipeline, tmp_path / "pipeline")
    shutil.copytree(pipeline / "unet", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"unet takes 1 channels, but .*vae makes latents of 4"):
        load_prior(folder)


@pytest.mark.parametrize("kind", [LCMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_what_a_scheduler_does_not_say_is_as_in_its_own_class(kind, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind.__name__}))
    bar, prediction = alphas_cumprod_of(tmp_path)
    assert (bar.tolist(), prediction) == (kind().alphas_cumprod.tolist(), "epsilon")
    path.write_text(json.dumps({"_class_name": kind.__name__, "predict_epsilon": False}))
    assert alphas_cumprod_of(tmp_path)[1] == "sample"


def test_weights_of_diffusers(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    for wrong in spoilt_tensors(state):
        if not any(v.dtype == torch.int64 for v in wrong.values()):  # diffusers converts those
            save_file(wrong, path, {"format": "pt"})
            assert refused(lambda: load_prior(folder), "unet")
    for part in cut(whole):
        path.write_bytes(part)
        assert refused(lambda: load_prior(folder), "unet")
