"""Priors: Gaussians and mixtures with exact posteriors, trained networks by name, and one's own."""

from diffoc.priors.pretrained import load_prior
from diffoc.priors.wrappers import wrap, wrap_edm

__all__ = ["load_prior", "wrap", "wrap_edm"]
