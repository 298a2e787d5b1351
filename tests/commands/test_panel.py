"""The quickstart's panel: every choice runs, and what goes wrong is said."""

import io
import re
from base64 import b64decode

import pytest
from PIL import Image

from diffoc.commands.panel import _IMAGES, Panel, _image
from diffoc.commands.solve import RECIPES
from diffoc.data.provenance import ROOT
from diffoc.priors.pretrained import SHIPPED
from diffoc.problems.tasks import TASKS

# Every task by the default; every recipe on a linear and on a nonlinear task; a refusal.
CHOICES = {(name, "ours") for name in TASKS} | {("phase_retrieval", "quick")}
CHOICES |= {(name, recipe) for name in ("super_resolution", "nonlinear_blur") for recipe in RECIPES}


@pytest.mark.parametrize(("name", "recipe"), sorted(CHOICES))
def test_every_task_and_every_recipe_runs_and_is_shown(name, recipe):
    panel = Panel(steps=3)  # RELEASED has one step less
    panel.image.value, panel.task.value = "digit 3", name
    panel.budget.min = panel.budget.value = 12
    panel.recipe.value = recipe
    panel.button.click()
    panel.worker.join()
    if recipe == "quick" and name in ("nonlinear_blur", "phase_retrieval"):
        assert "a guess needs a linear deepinv physics" in panel.status.value
        return
    assert panel.status.value.startswith("iteration ")
    assert panel.status.value.endswith("done")
    assert not panel.button.disabled
    with Image.open(io.BytesIO(panel.picture.value)) as picture:
        assert picture.width > 600
    assert 0 < panel.progress.value <= 1
    address = re.search(r'href="data:image/png;base64,([^"]+)"', panel.download.value)[1]
    with Image.open(io.BytesIO(b64decode(address))) as picture:
        assert picture.size == (28, 28)


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, TypeError, KeyError, ImportError])
@pytest.mark.parametrize("where", ["reconstruct", "load_prior"])
def test_what_goes_wrong_is_said(where, error, monkeypatch):
    def fail(*args, **options):
        raise error(f"no such thing in {ROOT}/data")

    monkeypatch.setattr(f"diffoc.commands.panel.{where}", fail)
    panel = Panel(steps=2)
    panel.run()
    assert panel.status.value.strip("'") == "no such thing in data"
    assert not panel.button.disabled


def test_a_reconstruction_can_be_cancelled_and_begun_again():
    panel = Panel(steps=2)
    panel.image.value, panel.noise.value = "digit 3", 0.01
    panel.status.observe(lambda change: panel.cancel.click(), "value")  # at the first sign of life
    panel.button.click()
    panel.worker.join()
    assert panel.status.value.startswith("iteration 1:")
    assert panel.status.value.endswith(", cancelled")
    assert panel.picture.value
    assert (panel.button.disabled, panel.cancel.disabled) == (False, True)

    panel.status.unobserve_all()
    panel.budget.min = panel.budget.value = 8
    panel.button.click()
    panel.worker.join()
    assert panel.status.value.endswith("done")


def test_images_fit_their_priors():
    for name, prior in _IMAGES.items():
        assert tuple(_image(name).shape[1:]) == SHIPPED[prior]
