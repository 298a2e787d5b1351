"""The methods of the tables by name, and the settings that they run with."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoc.baselines import methods
from diffoc.checks import check_member
from diffoc.data.files import replacing
from diffoc.data.manifest import data_folder

METHODS = methods()
"""All methods by their files' names."""

LATENT = {"faces64": "faces64_latent"}
"""The priors that methods in a latent space use in place of others."""


def prior_of(method: str, prior: str) -> str:
    """Returns the prior that a method has in a prior's tables: one of latents if it needs that."""
    return LATENT.get(prior, prior) if METHODS[method].latent else prior


def compared(prior: str, nfe: int) -> list[str]:
    """Returns the methods of a table: tuned ones that can have the budget and have a prior."""
    fit = [name for name, m in METHODS.items() if m.tuned and (prior in LATENT or not m.latent)]
    return [name for name in fit if takes(name, "super_resolution", nfe)]


def takes(method: str, task: str, nfe: int) -> bool:
    """Returns whether a method can have a budget."""
    try:
        METHODS[method].settings(task, nfe)
    except ValueError:
        return False
    return True


def read_tuned(path: Path | None = None) -> dict:
    """Returns tuned keyword arguments by prior, method, task and budget, of `data/tuned.json`."""
    path = path or data_folder() / "tuned.json"
    if not path.exists():
        return {}
    damaged = f"{path} is damaged, restore it from git"
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}") from error
    entries = [tuned]
    for level in ("prior", "method", "task", "budget", "keyword"):
        for each in entries:
            if not isinstance(each, dict):
                raise ValueError(f"{damaged}: expected values by {level} in place of {each!r}")
            if level == "budget" and not all(map(str.isdigit, each)):
                raise ValueError(f"{damaged}: budgets are {[*each]}, expected whole numbers")
        entries = [value for each in entries for value in each.values()]
    for value in entries:
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number and not isinstance(value, str):
            raise ValueError(f"{damaged}: a value is {value!r}, expected a finite number")
    return tuned


def write_tuned(tuned: dict, path: Path) -> None:
    """Replaces what :func:`read_tuned` reads."""
    with replacing(path) as part:
        part.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")


def settings_of(
    prior: str, method: str, task: str, nfe: int, overrides: dict, tuned: dict | None = None
) -> dict:
    """Returns a method's settings for a budget, as tuned (:func:`read_tuned`), then overridden."""
    check_member(METHODS, method=method)
    overrides = of_method(overrides, method)
    settings = METHODS[method].settings(task, nfe) | overrides
    tuned = read_tuned() if tuned is None else tuned
    best = tuned.get(prior, {}).get(method, {}).get(task, {}).get(str(nfe))
    keyword = next(iter(METHODS[method].tuned or {}), None)
    if best is None and keyword is not None and keyword not in settings:
        raise ValueError(
            f"method {method} is not tuned for {task} with {prior} and nfe {nfe}: run `python "
            f"-m diffoc tune {method} --prior {prior} --tasks {task} --nfe {nfe}`, or give "
            f"--set {keyword}=VALUE"
        )
    return settings | (best or {}) | overrides


def of_method(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Returns the settings for a method: KEY is for all, METHOD.KEY for one, and wins."""
    own = f"{method}."
    every = {key: value for key, value in settings.items() if "." not in key}
    return every | {k.removeprefix(own): v for k, v in settings.items() if k.startswith(own)}


def equal_work(method: str, task: str, nfe: int, product_cost: float) -> int:
    r"""Returns the largest budget of a method whose work is at most that of a given number.

    .. math:: F + c B \le N (1 + c)

    The right-hand side is the work of a method with a product for each of N evaluations, such as
    DPS; c, `product_cost`, is the cost of a product in evaluations. A method that uses no network
    keeps N, `nfe`.
    """
    most = nfe * (1 + product_cost)

    def work(budget: int) -> float:
        evaluations, products = METHODS[method].work(METHODS[method].settings(task, budget))
        return evaluations + product_cost * products

    if not work(nfe):
        return nfe
    return next(n for n in range(int(most), 0, -1) if n == 1 or work(n) <= most)
