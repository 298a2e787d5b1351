"""The ledger agrees with its sources, and a number that is changed anywhere is noticed."""

import copy
import json
import re
import shutil

import pytest
import yaml
from scipy.stats import ttest_rel

from diffoc.commands import main as command_line
from diffoc.data.provenance import ROOT
from diffoc.experiments import ledger
from diffoc.experiments.ledger import Computed

PRINTED = {
    "what": "error",
    "at_most": 1e-12,
    "unit": "relative error",
    "notebook": {"file": "01_small.ipynb", "cell": "last", "prints": "u = -g: error < 1e-12"},
}
RECORDED = {
    "what": "mean PSNR",
    "value": 22.0,
    "unit": "dB",
    "records": {"file": "small.csv", "column": "psnr", "where": {"method": "ours", "nfe": 3}},
}
DIFFERENCE = {
    "what": "ours minus theirs",
    "value": 1.5,
    "unit": "dB",
    "records": RECORDED["records"] | {"minus": {"method": "theirs"}},
}
COMPUTED = {"what": "image", "value": 0.79, "within": 0.005, "unit": "MB"}
COMPUTED |= {"recompute": "megabytes_of_an_image"}
NUMBERS = [PRINTED, RECORDED, DIFFERENCE, COMPUTED]
CLAIM = {"id": "one", "place": "Eq. 1", "says": "So it is.", "verdict": "exact", "reason": "It is."}
ENTRIES = [
    CLAIM | {"numbers": NUMBERS},
    CLAIM | {"id": "two", "verdict": "not run", "planned": "notebook 99"},
]
RECORDS = """status,method,nfe,image,psnr
ok,ours,3,a,20
ok,ours,3,b,24
failed,ours,3,c,
ok,ours,9,a,50
ok,theirs,3,a,19
ok,theirs,3,b,22
"""


@pytest.fixture
def folder(tmp_path):
    cell = {"id": "last", "cell_type": "code", "outputs": [{"output_type": "stream"}]}
    cell["outputs"][0]["text"] = ["one\n", "Established: u = -g: error < 1e-12\n"]
    other = {"id": "first", "cell_type": "markdown", "source": "u = -g: error < 1e-12"}
    (tmp_path / "01_small.ipynb").write_text(json.dumps({"cells": [other, cell]}))
    (tmp_path / "small.csv").write_text(RECORDS)
    write(tmp_path, ENTRIES)
    return tmp_path


def write(folder, entries):
    (folder / "claims.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))


def run(folder, **arguments):
    return ledger.run(folder / "claims.yaml", folder, folder, **arguments)


def test_what_is_printed(folder, capsys):
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 claims\n   1 exact\n   0 holds under a condition\n")
    assert "\n   1 not run\n" in out
    assert "EXACT  Eq. 1  [one]" in out
    assert "at most 1e-12 relative error: error (01_small, last)" in out
    assert "22 dB: mean PSNR (records, small.csv, rounding not measured)" in out
    assert "Planned: notebook 99" in out
    assert out.endswith("4 of 4 numbers agree with their sources\n")


def test_a_table_that_a_cell_shows_is_printed_too(folder):
    path = folder / "01_small.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output["data"] = {"text/markdown": output.pop("text")}
    path.write_text(json.dumps(notebook))
    assert run(folder) == 0


@pytest.mark.parametrize("number", range(len(NUMBERS)))
def test_a_changed_number_in_the_ledger(folder, capsys, number):
    entries = copy.deepcopy(ENTRIES)
    changed = entries[0]["numbers"][number]
    if "value" in changed:
        changed["value"] += 0.01
    else:
        changed["at_most"] = 1e-13
    write(folder, entries)
    assert run(folder) == 1
    out = capsys.readouterr().out
    assert "3 of 4 numbers agree" in out
    assert re.search(rf"^DISAGREES: one, {changed['what']}: the ledger has ", out, re.MULTILINE)


def test_a_changed_number_in_a_notebook(folder, capsys):
    path = folder / "01_small.ipynb"
    path.write_text(path.read_text().replace("g: error < 1e-12\\n", "g: error < 1e-11\\n"))
    assert run(folder, quick=True) == 1
    out = capsys.readouterr().out
    assert "01_small, last does not print 'u = -g: error < 1e-12'" in out
    assert "2 of 3 numbers agree" in out


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ours,3,b,24", "ours,3,b,24.1", "small.csv gives 22.05"),
        ("theirs,3,b,22", "theirs,3,b,22.1", "small.csv gives 1.45"),
        ("ours", "mine", "no row where"),
        ("psnr", "ssim", "no column psnr"),
    ],
)
def test_a_changed_number_in_the_records(folder, capsys, old, new, says):
    (folder / "small.csv").write_text(RECORDS.replace(old, new))
    assert run(folder) == 1
    assert says in capsys.readouterr().out


def test_a_difference_is_told_with_its_interval(folder, capsys):
    interval = ttest_rel([20, 24], [19, 22]).confidence_interval(0.95)
    assert run(folder) == 0
    assert f"+1.50 ± {(interval.high - interval.low) / 2:.2f} dB: ours" in capsys.readouterr().out


def test_a_difference_that_rounding_outweighs_is_no_claim(folder, capsys, monkeypatch):
    text = RECORDS.replace("method", "task,method").replace("ours", "t,ours")
    (folder / "small.csv").write_text(text.replace("theirs", "t,theirs"))
    entries = copy.deepcopy(ENTRIES)
    for number in entries[0]["numbers"]:
        for rows in ("where", "minus"):
            if rows in number.get("records", {}):
                number["records"][rows]["task"] = "t"
    write(folder, entries)
    known = {("ours", "t"): 0.4, ("theirs", "t"): 0.2}
    monkeypatch.setattr(ledger, "of_mean", lambda column, *which: known.get(which))
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "22 dB: mean PSNR (records, small.csv, moved by 0.4 by rounding)" in out
    assert "moved by 0.6 by rounding" in out  # the difference
    known["theirs", "t"] = 2.0
    assert run(folder) == 1
    assert "is a difference, and rounding moves it by 2.4" in capsys.readouterr().out


@pytest.mark.parametrize("found", [0.78, float("nan")])
def test_a_changed_computation(folder, capsys, monkeypatch, found):
    monkeypatch.setitem(ledger.recomputable(), "megabytes_of_an_image", lambda: found)
    assert run(folder, quick=True) == 0
    assert "not recomputed" in capsys.readouterr().out
    assert run(folder) == 1
    assert f"computed, megabytes_of_an_image gives {found:g}" in capsys.readouterr().out


def test_missing_sources(folder, capsys):
    (folder / "01_small.ipynb").unlink()
    (folder / "small.csv").unlink()
    assert run(folder, quick=True) == 1
    out = capsys.readouterr().out
    assert "there is no notebook 01_small.ipynb" in out
    assert "there is no table small.csv" in out
    (folder / "01_small.ipynb").write_text('{"cells": []}')
    run(folder, quick=True)
    assert "01_small.ipynb has no cell last" in capsys.readouterr().out


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


WITH_NUMBERS = CLAIM | {"numbers": [COMPUTED]}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("text", "'text' is not a mapping"),
        (without(WITH_NUMBERS, "says"), "argument: 'says'"),
        (WITH_NUMBERS | {"verdcit": "exact"}, "unexpected keyword argument 'verdcit'"),
        (WITH_NUMBERS | {"verdict": "true"}, "verdict is 'true', expected one of exact"),
        (WITH_NUMBERS | {"reason": " "}, "reason is ' ', expected a text"),
        (WITH_NUMBERS | {"id": 4.1}, "claim 4.1: id is 4.1, expected a text"),
        (WITH_NUMBERS | {"numbers": "many"}, "'m' is not a mapping"),
        (WITH_NUMBERS | {"planned": "later"}, "has numbers, and no planned"),
        (CLAIM, "has numbers, and no planned"),
        (CLAIM | {"verdict": "not run"}, "has planned, and no numbers"),
        (WITH_NUMBERS | {"verdict": "not run", "planned": "x"}, "has planned, and no numbers"),
        (CLAIM | {"numbers": [3]}, "3 is not a mapping"),
        (CLAIM | {"numbers": [without(COMPUTED, "unit")]}, "argument: 'unit'"),
        (CLAIM | {"numbers": [without(COMPUTED, "recompute")]}, "needs one source"),
        (CLAIM | {"numbers": [COMPUTED | PRINTED]}, "needs one source"),
        (CLAIM | {"numbers": [COMPUTED | {"recompute": "pi"}]}, "recompute is 'pi'"),
        (CLAIM | {"numbers": [COMPUTED | {"recompute": "solve"}]}, "recompute is 'solve'"),
        (CLAIM | {"numbers": [COMPUTED | {"at_most": 1.0}]}, "either a value or at_most"),
        (CLAIM | {"numbers": [without(PRINTED, "at_most")]}, "either a value or at_most"),
        (CLAIM | {"numbers": [without(COMPUTED, "within")]}, "within belongs to a value"),
        (CLAIM | {"numbers": [PRINTED | {"within": 0.1}]}, "within belongs to a value"),
        (CLAIM | {"numbers": [RECORDED | {"within": 0.1}]}, "within belongs to a value"),
        (CLAIM | {"numbers": [PRINTED | {"at_most": "1e-12"}]}, "a number such as 1.0e-12"),
        (CLAIM | {"numbers": [COMPUTED | {"value": True}]}, "value is True"),
        (CLAIM | {"numbers": [PRINTED | {"notebook": {"file": "a"}}]}, "'cell' and 'prints'"),
        (CLAIM | {"numbers": [PRINTED | {"notebook": "a"}]}, "'a' is not a mapping"),
        (
            CLAIM | {"numbers": [RECORDED | {"records": RECORDED["records"] | {"where": "a"}}]},
            "'a' is not a mapping",
        ),
    ],
)
def test_a_malformed_ledger(tmp_path, entry, says):
    write(tmp_path, [entry])
    with pytest.raises(ValueError, match=r"^claims\.yaml, claim ") as error:
        ledger.read(tmp_path / "claims.yaml")
    assert says in str(error.value)


def test_a_ledger_that_is_none(tmp_path):
    path = tmp_path / "claims.yaml"
    with pytest.raises(FileNotFoundError, match="expected the ledger there"):
        ledger.read(path)
    for text, says in (("a: [", "is no YAML"), ("", "list of claims"), ("a: b", "list of claims")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            ledger.read(path)
    write(tmp_path, [WITH_NUMBERS, WITH_NUMBERS])
    with pytest.raises(ValueError, match="the id one more than once"):
        ledger.read(path)


# The ledger of the repository


def test_every_printed_and_recorded_number_of_the_repository():
    numbers = [number for claim in ledger.read() for number in claim.numbers]
    assert [found for number in numbers if (found := ledger.check(number, quick=True))] == []


def test_the_command(capsys):
    assert command_line.main(["claims", "--quick"]) == 0
    assert " numbers agree with their sources" in capsys.readouterr().out


def test_the_command_tells_of_a_malformed_ledger(tmp_path, monkeypatch, capsys):
    write(tmp_path, [CLAIM])
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "claims.yaml")
    assert command_line.main(["claims"]) == 2
    assert capsys.readouterr().err.startswith("diffoc: claims.yaml, claim one: a claim with a")


def test_the_command_compares_other_notebooks(tmp_path, capsys):
    shutil.copytree(ledger.NOTEBOOKS, tmp_path / "notebooks")
    path = tmp_path / "notebooks" / "03b_what_theorem_4_1_does_not_say.ipynb"
    path.write_text(path.read_text().replace("conditional score 0.118", "conditional score 0.119"))
    assert command_line.main(["claims", "--quick", "--notebooks", str(path.parent)]) == 1
    out = capsys.readouterr().out
    where = "03b_what_theorem_4_1_does_not_say, cell-49"
    assert f"DISAGREES: sec-4-true-score, conditional score there: {where}" in out


def test_the_results_count_as_the_ledger_does():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = ledger.counts(ledger.read())
    assert f"ledger of {sum(found.values())} claims" in text
    for verdict, count in found.items():
        assert f"\n| {verdict} | {count} |" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{sum(found.values())} claims" in readme


def test_the_results_have_the_numbers_of_the_ledger():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    values = {
        number.source.name: number.value
        for claim in ledger.read()
        for number in claim.numbers
        if isinstance(number.source, Computed)
    }
    for name, shown in (
        ("rollout_score_ratio", "{:.0f} times too long"),
        ("table_1_firsts_at_2500", "first in {:g} of 10 columns"),
        ("table_1_firsts_at_1000", "with NFE 1000 in {:g} |"),
        ("table_3_firsts_by_psnr", "best PSNR on {:g} of 5 tasks"),
        ("table_3_firsts_by_ssim", "best SSIM on {:g} |"),
        ("table_4_gain_by_psnr", "gain of {:.2f} dB by one"),
        ("table_4_gain_by_mse", "{:.2f} dB by the other"),
        ("table_6_gap", "off by {:.2f} dB"),
        ("table_6_gap_rotated", "then by {:.2f} dB"),
        ("evaluations_of_table_2", "{:g} evaluations |"),
    ):
        assert shown.format(values[name]) in text


def test_planned_commands_are_commands():
    commands = [
        c.planned for c in ledger.read(ledger.LEDGER) if c.planned and "python -m" in c.planned
    ]
    assert len(commands) >= 4
    for command in commands:
        start, _, words = command.partition("python -m diffoc ")
        assert not start
        command_line.parser_of().parse_args(words.split())  # exits where it does not know one
