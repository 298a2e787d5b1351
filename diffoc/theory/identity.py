"""What a checked statement is: its name, its setting, its error and the bound of that error."""

from dataclasses import dataclass

EXACT = 1e-12
"""The bound on the relative error of what is equal in exact arithmetic."""

QUADRATURE = 1e-8
"""The bound on the relative error of what is equal but for two different quadratures."""

SLOPE = 0.05
"""The bound on the relative deviation of a fitted slope from the theory's."""


@dataclass(frozen=True)
class Identity:
    """One statement, the setting where it was tried, its relative error and the bound of that."""

    name: str
    setting: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Returns whether the error is within the bound (a NaN is not)."""
        return self.error <= self.bound
