"""What the notebooks of the theory check: settings and identities, each once, in float64.

The real line is done by quadrature (:mod:`diffoc.theory.line`), Gaussians in closed form
(:mod:`diffoc.theory.linear_gaussian`, :mod:`diffoc.theory.riccati_sampler`), mixtures by their
oracles.
"""
