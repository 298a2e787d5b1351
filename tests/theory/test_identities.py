"""The identities hold, and the command that prints them fails when one does not."""

import math

import pytest
import torch

from diffoc.commands import main as command_line
from diffoc.theory import doob_identities, identities
from diffoc.theory.identities import Identity
from diffoc.theory.linear_gaussian import fitted_slope, relative_error


def test_a_broken_theory_is_noticed(monkeypatch):
    """Half of g^2, the constant of the ODE in place of the SDE's, is no limit of the controls."""

    def halved(schedule, t, drift_and_diffusion=doob_identities.drift_and_diffusion):
        phi, g2 = drift_and_diffusion(schedule, t)
        return phi, g2 / 2

    monkeypatch.setattr(doob_identities, "drift_and_diffusion", halved)
    assert not next(doob_identities.price_of_noise()).holds


def test_verify_exits_with_1_above_a_bound(monkeypatch, capsys):
    def group():
        yield Identity("right", "here", 1e-13, 1e-12)
        yield Identity("wrong", "there", 1e-11, 1e-12)

    monkeypatch.setattr(identities, "IDENTITIES", (group,))
    assert command_line.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 within their bounds" in out
    assert "ABOVE ITS BOUND" in out


def test_verify_exits_with_0_within_the_bounds(monkeypatch):
    monkeypatch.setattr(identities, "IDENTITIES", (identities.standard_normal_scores,))
    assert command_line.main(["verify"]) == 0


def test_a_nan_does_not_hold():
    assert not Identity("", "", math.nan, 1.0).holds


def test_fitted_slope_of_a_power_law():
    x = [1.0, 2.0, 5.0, 10.0]
    assert math.isclose(fitted_slope(x, [3 * v**-1.5 for v in x]), -1.5, rel_tol=1e-12)


def test_relative_error():
    value, reference = torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])
    assert math.isclose(relative_error(value, reference), 0.2, rel_tol=1e-6)


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(["nonsense"])
    assert error.value.code == 2


def test_missing_data_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DIFFOC_DATA", str(tmp_path))
    assert command_line.main(["fit", "mnist", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffoc: ")
    assert str(tmp_path) in error
