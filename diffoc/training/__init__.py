"""How the shipped networks and mixtures are trained and judged."""
