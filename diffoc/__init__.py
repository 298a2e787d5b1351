"""Diffusion optimal control: reverse diffusion as a dynamical system, steered by iLQR.

The executable companion of "Solving Inverse Problems via Diffusion Optimal Control"
(Li & Pereira, NeurIPS 2024, arXiv:2412.16748). Data flows through the modules in this order::

    priors, operators -> process -> costs -> riccati -> ilqr

Pretrained priors come by name, from :func:`load_prior`.

Equation numbers in the docstrings are the paper's.
"""

from diffoc.pretrained import load_prior
from diffoc.weights import classifier

__all__ = ["classifier", "load_prior"]
__version__ = "0.1.0"
