"""What looks for results that depend on the machine: jitters, and how far bounds are away."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import portability
import portable
import pytest

CODE = """
import sys
sys.path.insert(0, {tools!r})
import safetensors.torch
import torch
import portability
plain = safetensors.torch.load
for i, seed in enumerate((1, 2, 1)):
    # Only what is imported now is perturbed, by this seed alone.
    safetensors.torch.load = plain
    for name in [name for name in sys.modules if name.split(".")[0] == "diffoc"]:
        del sys.modules[name]
    portability.perturb(seed)
    from diffoc import load_prior
    from diffoc.data import digits
    from diffoc.problems.tasks import measure, super_resolution
    weights = torch.cat([p.flatten() for p in load_prior("mnist").parameters()])
    y = measure(super_resolution(), digits()[0], torch.Generator().manual_seed(0))
    torch.save((weights, y), {folder!r} + f"/{{i}}.pt")
"""


def test_a_jitter_changes_weights_and_measurements_by_a_millionth(tmp_path):
    import torch

    from diffoc import load_prior
    from diffoc.data import digits
    from diffoc.problems.tasks import measure, super_resolution

    weights = torch.cat([p.flatten() for p in load_prior("mnist").parameters()])
    y = measure(super_resolution(), digits()[0], torch.Generator().manual_seed(0))
    tools = str(Path(portability.__file__).parent)
    code = CODE.format(folder=str(tmp_path), tools=tools)
    subprocess.run([sys.executable, "-c", code], check=True)
    found, other, again = (torch.load(tmp_path / f"{i}.pt") for i in range(3))
    for plain, changed in zip((weights, y), found, strict=True):
        z = ((changed.double() / plain.double() - 1) / portability.SIZE)[plain.abs() > 1e-3]
        assert abs(z.mean()) < 0.1
        assert z.std() == pytest.approx(1, abs=0.05)
    assert all(map(torch.equal, found, again))
    assert not torch.equal(found[0], other[0])


def run(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """The comparisons that a cell's assertions record."""
    log = tmp_path / "cell.log"
    log.unlink(missing_ok=True)
    monkeypatch.setenv("PORTABLE_LOG", str(log))
    tree = portability.Recorder().visit(ast.parse(source))
    exec(compile(tree, "cell", "exec"), {"__compare__": portability.compare})
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_asserted_comparisons_are_recorded_and_mean_what_they_did(tmp_path, monkeypatch):
    assert run("x = 2\nassert 1 < x <= 3, 'no'", tmp_path, monkeypatch) == [
        ["1 < x <= 3", "<", 1, 2],
        ["1 < x <= 3", "<=", 2, 3],
    ]
    assert run("assert all(a < 3 for a in (1, 2))", tmp_path, monkeypatch) == [
        ["a < 3", "<", 1, 3],
        ["a < 3", "<", 2, 3],
    ]
    for source in ("y = 1 < 2", "assert 1 == 1 != 2", "assert 'a' < 'b'", "assert 1 in (1, 2)"):
        assert run(source, tmp_path, monkeypatch) == []
    with pytest.raises(AssertionError, match="no"):
        run("assert 3 < 2 < 4, 'no'", tmp_path, monkeypatch)


def test_a_bound_is_measured_in_spreads(tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "BUILD", tmp_path)
    monkeypatch.setattr(portable, "ROOT", tmp_path)
    for setting, error in (("one", 0.2), ("two", 0.4), ("three", 0.3)):
        (tmp_path / setting).mkdir()
        rows = [["error < 1", "<", error, 1], ["same > 0", ">", 1, 0]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / setting / "tests-a.log").write_text(text)
    ((ratio, place, least, most, spread),) = portable.bounds(
        tmp_path / "tests" / "a", ["one", "two", "three"]
    )
    assert place == "error < 1 [<]"
    assert (ratio, least, most, spread) == pytest.approx((0.7 / 0.2, 0.6, 0.8, 0.2))


def test_settings_are_what_this_cpu_can_run():
    assert portable.can_run("default")
    assert portable.can_run("jitter1")
    assert all(portable.can_run(name) for name in portable.SETTINGS if name not in portable.FLAG)
