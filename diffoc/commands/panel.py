"""Buttons and sliders for the quickstart notebook: the controller at work, live.

The controller runs in a thread of its own: a kernel that ran it in the button's callback would hear
nothing else, not even the button that cancels, before it was done.
"""

import io
from base64 import b64encode
from threading import Event, Thread

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffoc.commands.solve import RECIPES, Settings, picture_of
from diffoc.data import images as data
from diffoc.data.provenance import told
from diffoc.figures import sheet, show
from diffoc.priors.pretrained import load_prior
from diffoc.problem import Problem
from diffoc.problems.metrics import image_metrics
from diffoc.problems.tasks import TASKS, measure, task
from diffoc.recipe import OURS
from diffoc.reconstruct import reconstruct

# What can be chosen: the images that ship with the repository, each with its prior.
_IMAGES = {
    "astronaut": "faces64",
    "grace hopper": "faces64",
    **{f"digit {d}": "mnist" for d in range(10)},
}


def _image(name: str) -> Tensor:
    if name.startswith("digit"):
        return data.digits()[0][2 * int(name[-1])][None]
    return data.portrait(name.replace(" ", "_"))


class _Cancelled(Exception):
    """Raised between two iterations, to leave the solver."""


class Panel:
    """Widgets to choose image, task, noise, recipe and budget, and to watch the reconstruction.

    Attributes:
        view: the widget, to be displayed.
        steps: T of the reverse process; None for the recipe's.
        worker: the thread that reconstructs, or did last; None before the first.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps
        self.image = widgets.Dropdown(options=list(_IMAGES), description="image")
        names = [(name.replace("_", " "), name) for name in TASKS]
        self.task = widgets.Dropdown(options=names, description="task")
        self.noise = widgets.FloatSlider(0.05, min=0.01, max=0.5, step=0.01, description="noise")
        self.recipe = widgets.Dropdown(options=list(RECIPES), description="recipe")
        self.budget = widgets.IntSlider(
            OURS.budget, min=60, max=1000, step=20, description="evaluations"
        )
        self.button = widgets.Button(description="Reconstruct", button_style="primary")
        self.cancel = widgets.Button(description="Cancel", disabled=True)
        self.status = widgets.Label()
        self.progress = widgets.FloatProgress(0, min=0, max=1, description="spent")
        self.picture = widgets.Image(format="png", width=760)
        self.download = widgets.HTML()
        self.worker: Thread | None = None
        self._cancelled = Event()
        self.button.on_click(lambda _: self.start())
        self.cancel.on_click(lambda _: self._cancelled.set())
        controls = [self.image, self.task, self.noise, self.recipe, self.budget]
        self.view = widgets.VBox(
            [
                widgets.HBox(controls[:3]),
                widgets.HBox([*controls[3:], self.button, self.cancel]),
                widgets.HBox([self.progress, self.status]),
                self.picture,
                self.download,
            ]
        )

    def start(self) -> None:
        """Begins `run` in a thread, and returns at once."""
        self.button.disabled = True  # here already, or a double click would start two
        self.worker = Thread(target=self.run, daemon=True)
        self.worker.start()

    def run(self) -> None:
        """Measures the chosen image and reconstructs it, showing every iteration.

        The bar is the share of the budget that is spent, and a link under the picture downloads
        the reconstruction as PNG. *Cancel* ends it after the iteration that is going on; the last
        picture stays.
        """
        self.button.disabled = True
        self._cancelled.clear()
        self.cancel.disabled = False
        try:
            self._run()
        except _Cancelled:
            self.status.value += ", cancelled"
        except Exception as error:  # in a thread nobody else would hear of it
            self.status.value = told(error) or type(error).__name__
        finally:
            self.cancel.disabled = True
            self.button.disabled = False

    def _run(self) -> None:
        self.status.value, self.progress.value = "measuring", 0
        # What is used twice is read once: it may be changed meanwhile.
        image, name, noise = self.image.value, self.task.value, self.noise.value
        prior = load_prior(_IMAGES[image])
        spent: list[int] = []
        prior.register_forward_hook(lambda *_: spent.append(1))
        truth = _image(image)
        generator = torch.Generator().manual_seed(0)
        physics = task(name, prior.image_shape, generator)
        y = measure(physics, truth, generator, noise)
        costs, budget = [], self.budget.value

        def show(iteration: int, cost: Tensor, x0: Tensor) -> None:
            costs.append(cost.item())
            psnr = image_metrics(x0, truth)["psnr"].item()
            self.status.value = f"iteration {iteration + 1}: cost {costs[-1]:.4g}, {psnr:.2f} dB"
            self.progress.value = len(spent) / budget  # the widget clips what is above 1
            self.picture.value = _draw(truth, picture_of(y, name), x0, costs)
            self.download.value = _link(x0)
            if self._cancelled.is_set():
                raise _Cancelled

        chosen = Settings(name, _IMAGES[image], noise, self.recipe.value, budget, self.steps)
        result = reconstruct(Problem(physics, y, noise), prior, chosen.changed, callback=show)
        if not costs:
            show(-1, result.cost, result.x0)  # the guess alone, which is no iteration
        self.status.value += ", done"


def _link(x0: Tensor) -> str:
    """Returns a link that downloads an image (1, C, H, W) as PNG; it needs no server."""
    content = io.BytesIO()
    Image.fromarray(sheet(x0, 1).numpy()).save(content, "png")
    address = "data:image/png;base64," + b64encode(content.getvalue()).decode()
    return f'<a download="reconstruction.png" href="{address}">Download the reconstruction</a>'


def _draw(truth: Tensor, measurement: Tensor, x0: Tensor, costs: list[float]) -> bytes:
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
    pictures = {"truth": truth, "measurement": measurement, "reconstruction": x0}
    for ax, (title, picture) in zip(axes, pictures.items(), strict=False):
        show(ax, picture[0])
        ax.set_title(title)
    axes[-1].semilogy(range(1, len(costs) + 1), costs)
    axes[-1].set(title="cost", xlabel="iteration")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=80)
    return content.getvalue()
