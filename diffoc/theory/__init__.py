"""What the notebooks of the theory check: settings and identities, each once, in float64."""
