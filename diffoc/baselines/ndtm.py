r"""Non-linear diffusion trajectory matching (NDTM): Pandey et al. 2025, arXiv:2502.03686.

At every time t a control u of the step's input minimises, by N steps of Adam from u = 0,

.. math::
    w \, \|A(m(x_t + \gamma u, t)) - y\|^2 + \kappa_t \gamma^2 \, \|\gamma u\|^2
      + \tau_t \, \|z(x_t + \gamma u, t) - z(x_t, t)\|^2, \qquad
    z(x, t) = (x - \alpha_t m(x, t)) / \sigma_t ,

the cost at the end as Tweedie's estimate has it, and two parts that bound how far the step's mean
is moved. Then a step of DDIM is taken from :math:`x_t + \gamma u`,

.. math::
    x_s = \alpha_s m + c_2 z + c_1 \varepsilon, \qquad
    c_1 = \eta \frac{\sigma_s}{\sigma_t} \Big(\sigma_t^2
        - \frac{\alpha_t^2}{\alpha_s^2} \sigma_s^2\Big)^{1/2}, \qquad c_2^2 = \sigma_s^2 - c_1^2 .

The weights are the released code's, for DDIM, times factors that are 1 or 0 there:

.. math::
    \kappa_t \propto \alpha_t^2 / \alpha_s^2, \qquad
    \tau_t \propto \big(c_2 - \alpha_s \sigma_t / \alpha_t\big)^2 .

Adam's rate falls linearly over the times to zero. The released code starts from noise added to
:math:`A^\dagger y`, at 0.4 to 0.6 of the time; `start` is that, for linear operators. It clips
means to [-1, 1], which ours does not, for priors of any range.
"""

from itertools import pairwise

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from diffoc.baselines import Given, Method, method
from diffoc.baselines.decomposition import pseudo_inverse
from diffoc.checks import check_above, check_at_least, check_steps, check_whole, check_within


@method
def ndtm(
    given: Given,
    *,
    steps: int = 50,
    iterations: int = 5,
    guidance: float = 50.0,
    control_cost: float = 1.0,
    score_cost: float = 1.0,
    scale: float = 1.0,
    rate: float = 0.01,
    eta: float = 0.7,
    start: float = 1.0,
) -> Tensor:
    r"""Returns images (B, ...) by NDTM, whose weights have to be tuned to the noise.

    The defaults are those of the released code for super-resolution of faces, but for `start`.

    Args:
        iterations: the number N of Adam's steps at each time, at least 1.
        guidance: the weight w of the residual, not negative.
        control_cost: the factor of :math:`\kappa_t`, not negative.
        score_cost: the factor of :math:`\tau_t`, not negative.
        scale: the factor :math:`\gamma` of controls, above 0.
        rate: Adam's learning rate at time 1, above 0.
        eta: how much noise DDIM adds, from 0 for none to 1 for DDPM's.
        start: the first time in ]0, 1]. Below 1 the first state is :math:`A^\dagger y` with noise
            added, if the operator is linear; else the first time is 1 all the same.
    """
    check_steps(steps=steps)
    check_whole(1, iterations=iterations)
    check_at_least(0, guidance=guidance, control_cost=control_cost, score_cost=score_cost)
    check_above(0, scale=scale, rate=rate, start=start)
    check_within(0, 1, eta=eta, start=start)
    prior, physics, y, x = given.prior, given.physics, given.y, given.x

    def control(x: Tensor, t: Tensor, lr: float, weights: tuple[float, float]) -> Tensor:
        alpha, sigma = prior.schedule(t)
        u = torch.zeros_like(x, requires_grad=True)
        optimizer = torch.optim.Adam([u], lr=lr)
        with torch.enable_grad():
            for i in range(iterations):
                controlled = x + scale * u
                mean = prior(controlled, t).mean
                z = (controlled - alpha * mean) / sigma
                if i == 0:
                    uncontrolled = z.detach()
                cost = guidance * (physics.A(mean) - y).square().sum()
                cost = cost + weights[0] * scale**2 * (scale * u).square().sum()
                cost = cost + weights[1] * (z - uncontrolled).square().sum()
                (u.grad,) = torch.autograd.grad(cost, u)
                optimizer.step()
        return u.detach()

    if not isinstance(physics, LinearPhysics):
        start = 1.0
    times = start * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    scales = torch.stack(prior.schedule(times), dim=1).tolist()
    with torch.no_grad():
        if start < 1:
            alpha, sigma = scales[0]
            noise = x / prior.schedule(torch.ones_like(times[0]))[1].item()
            x = alpha * pseudo_inverse(physics, y) + sigma * noise
        for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(pairwise(scales)):
            t = times[i].to(x)
            new = eta**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
            kept = sigma_s * (1 - new) ** 0.5
            weights = (
                control_cost * (alpha_t / alpha_s) ** 2,
                score_cost * (kept - alpha_s * sigma_t / alpha_t) ** 2,
            )
            x = x + scale * control(x, t, rate * (1 - i / steps), weights)
            mean = prior(x, t).mean
            ahead = alpha_s * mean + kept / sigma_t * (x - alpha_t * mean)
            x = ahead + sigma_s * new**0.5 * given.noise()
    return x


def _settings(task: str, nfe: int) -> dict:
    # The released code's, by its scripts for faces, and for blurs by its example of one.
    if task == "super_resolution":
        settings = {"iterations": 5, "guidance": 50.0, "eta": 0.7, "start": 0.4}
    elif task.endswith("inpainting"):
        settings = {"iterations": 2, "guidance": 1.0, "eta": 0.2, "start": 0.5}
        settings |= {"control_cost": 0.0, "score_cost": 0.0}
    else:
        settings = {"iterations": 2, "guidance": 50.0, "eta": 0.1, "start": 0.6}
    return settings | {"steps": max(1, nfe // (settings["iterations"] + 1))}


METHOD = Method(
    "NDTM",
    ndtm,
    _settings,
    lambda s: (s["steps"] * (s["iterations"] + 1), s["steps"] * s["iterations"]),
    # In the released code 1 or 4, and 0.01. The guidance is not tuned: Adam undoes its scale.
    tuned={"scale": (1.0, 2.0, 4.0, 8.0), "rate": (0.01, 0.03)},
)
