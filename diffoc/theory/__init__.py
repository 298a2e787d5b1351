"""Control and the conditional score, for any prior: what the theory notebooks derive and verify.

Everything is in float64 and small: the real line by quadrature (:mod:`diffoc.theory.line`),
Gaussians in closed form (:mod:`diffoc.theory.riccati_sampler`), mixtures by their oracles.
"""
