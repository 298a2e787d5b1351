"""The identities hold, and every recomputed number is right; not if the theory were wrong."""

import inspect
import math
from functools import cache, partial

import pytest

from diffoc.experiments import ledger, paper_tables
from diffoc.experiments.ledger import Computed
from diffoc.theory import claims, identities

COMPUTED = [
    (claim.id, number)
    for claim in ledger.read()
    for number in claim.numbers
    if isinstance(number.source, Computed)
]


BY_QUADRATURE = ("score_is_a_control", "doob", "flow_push_forward")


@cache
def rows_of(group):
    return list(group())


@pytest.mark.parametrize("group", identities.IDENTITIES, ids=lambda group: group.__name__)
def test_identities_hold(group):
    assert rows_of(group)
    for row in rows_of(group):
        assert row.holds, row
        exact = 1e-8 if group.__name__ in BY_QUADRATURE else 1e-12
        assert row.bound == (0.05 if "slope" in row.setting else exact)


@pytest.mark.parametrize(("name", "number"), COMPUTED, ids=lambda value: str(value))
def test_the_ledger_has_what_is_recomputed(name, number, monkeypatch):
    once = {
        group.__name__: partial(ledger._largest_error, partial(rows_of, group))
        for group in identities.IDENTITIES
    }
    known = ledger.recomputable() | once
    monkeypatch.setattr(ledger, "recomputable", lambda: known)
    assert ledger.check(number) is None


def test_the_ledger_uses_every_function():
    functions = {name for name, f in ledger.recomputable().items() if inspect.isfunction(f)}
    groups = {group.__name__ for group in identities.IDENTITIES}
    assert not functions & groups, "one name for two computations"
    assert functions <= {number.source.name for _, number in COMPUTED}


def test_a_wrong_constant_of_the_lemma_is_noticed(monkeypatch):
    def doubled(schedule, t, drift_and_diffusion=identities.drift_and_diffusion):
        phi, g2 = drift_and_diffusion(schedule, t)
        return phi, 2 * g2

    monkeypatch.setattr(identities, "drift_and_diffusion", doubled)
    assert ledger.recomputable()["lemma_4_2"]() > 1e-4


def test_a_wrong_gradient_is_noticed(monkeypatch):
    gradient = identities.rollout_gradient
    monkeypatch.setattr(identities, "rollout_gradient", lambda *given: 1.01 * gradient(*given))
    assert math.isclose(ledger.recomputable()["first_order"](), 0.01 / 1.01, rel_tol=1e-9)
    assert ledger.recomputable()["predictor_corrector"]() > 1e-6


def test_the_ratio_of_scores_in_numbers_of_notebook_03():
    assert math.isclose(claims.rollout_score_ratio(), 40.0 / 0.118, rel_tol=0.005)


def test_psnr_of_an_mse():
    assert math.isclose(paper_tables._psnr(255**2), 0)
    assert math.isclose(paper_tables._psnr(141.2), 26.6, abs_tol=0.05)
    assert math.isclose(paper_tables._psnr(117.0), 27.4, abs_tol=0.05)


def test_a_changed_cell_of_the_papers_tables_is_noticed(monkeypatch):
    def changed(table, paper=paper_tables.paper_rows):
        rows = paper(table)
        rows[0]["super_resolution"]["psnr"] = 26.6
        return rows

    monkeypatch.setattr(paper_tables, "paper_rows", changed)
    numbers = paper_tables.NUMBERS
    assert math.isclose(numbers["table_3_gap"](), 0.849, abs_tol=1e-3)
    assert numbers["table_3_firsts_by_psnr"]() == 5
    assert math.isclose(numbers["table_4_gap"](), 2.262, abs_tol=1e-3)
