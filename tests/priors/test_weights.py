"""Weights on disk: half precision, checked, and as good as what was trained."""

import pytest
import torch

from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.priors.networks import DigitClassifier
from diffoc.priors.pretrained import SHIPPED
from diffoc.priors.weights import classifier, load_shipped, write_weights
from diffoc.training.trainer import PLANS, denoiser, time_of


def test_half_precision_gives_the_same_results_to_a_percent(tmp_path):
    torch.manual_seed(0)
    network = DigitClassifier()
    path = write_weights(network, "classifier", tmp_path)
    assert path.stat().st_size < 2 * 422_000 + 4096
    x = torch.rand(8, 1, 28, 28) * 2 - 1
    read = load_shipped(DigitClassifier, "classifier", tmp_path)
    torch.testing.assert_close(read(x), network(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["mnist", "faces64"])
def test_a_denoiser_in_half_precision_estimates_the_same_to_a_percent(name, tmp_path):
    torch.manual_seed(0)
    network, read = PLANS[name].build(), PLANS[name].build()
    path = write_weights(network, name, tmp_path)
    assert path.stat().st_size < 16 * 2**20
    read.load_state_dict({k: v.float() for k, v in manifest.load_weights(name, tmp_path).items()})
    x = torch.randn(2, *SHIPPED[name])
    for sigma in (0.01, 0.3, 5.0):
        t = time_of(torch.tensor(sigma))
        with torch.no_grad():
            expected, found = (
                denoiser(network)(sigma * x, t).mean,
                denoiser(read)(sigma * x, t).mean,
            )
        assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", ["mnist", "judge"])
def test_the_shipped_classifiers_read_digits_that_they_have_never_seen(name):
    """The twenty sample digits were kept out of their training."""
    images, labels = data.digits()
    assert (classifier(name)(images).argmax(1) == labels).sum() >= 19


def test_altered_weights_are_refused(tmp_path):
    path = write_weights(DigitClassifier(), "classifier", tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="classifier"):
        load_shipped(DigitClassifier, "classifier", tmp_path)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="name is"):
        classifier("cifar")
