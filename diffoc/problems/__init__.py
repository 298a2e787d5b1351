"""Inverse problems: operators, how they measure, and how a reconstruction is judged."""
