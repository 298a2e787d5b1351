"""Priors: Gaussians and mixtures with exact posteriors, and trained networks by name."""
