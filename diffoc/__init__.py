"""Diffusion optimal control: reverse diffusion as a dynamical system, steered by iLQR.

The executable companion of "Solving Inverse Problems via Diffusion Optimal Control"
(Li & Pereira, NeurIPS 2024, arXiv:2412.16748). Data flows through the modules in this order::

    priors, operators -> process -> costs -> riccati -> ilqr

Equation numbers in the docstrings are the paper's.
"""

__version__ = "0.1.0"
