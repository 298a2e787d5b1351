"""The comparison's table: methods as their libraries have them, rows that survive a stop."""

import pytest
import torch
from azula.guidance import DPSSampler

from diffoc import experiments
from diffoc.data import data_folder, digits, manifest_entry, portrait
from diffoc.experiments import COLUMNS, DPS_GUIDANCE, compare, control, dps, read
from diffoc.metrics import image_metrics
from diffoc.pretrained import load_prior
from diffoc.tasks import TASKS, measure, task


def test_dps_is_azula_s(monkeypatch):
    monkeypatch.setattr(experiments, "DPS_STEPS", 15)
    prior, generator = load_prior("mnist"), torch.Generator().manual_seed(0)
    physics = task("super_resolution", (1, 28, 28), generator)
    y = measure(physics, digits()[0][:1], generator)
    found, counts = dps(prior, "super_resolution", physics, y)
    assert counts["evaluations"] == 15
    zeta = DPS_GUIDANCE["super_resolution"]
    sampler = DPSSampler(prior, y, lambda x: physics.A(x.float()), zeta=zeta, steps=15, silent=True)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(4)
        expected = sampler(torch.randn(1, 1, 28, 28)).float()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_the_controller_keeps_its_budget_and_explains_the_measurement():
    generator = torch.Generator().manual_seed(0)
    physics = task("super_resolution", (1, 64, 64), generator)
    truth = portrait("astronaut")
    y = measure(physics, truth, generator)
    x0, counts = control(load_prior("faces64"), "super_resolution", physics, y)
    assert counts["evaluations"] <= 1000
    assert (physics.A(x0) - y).square().mean().sqrt() < 1.2 * 0.05
    # Better than interpolation, which knows nothing of faces.
    simple = torch.nn.functional.interpolate(y, scale_factor=4, mode="bicubic")
    assert image_metrics(x0, truth)["psnr"] > image_metrics(simple, truth)["psnr"]


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    faces = torch.cat([portrait("astronaut"), portrait("grace_hopper")])
    monkeypatch.setattr(experiments, "held_out_faces", lambda: faces)
    calls = []

    def stopped_once(prior, name, physics, y):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return faces + 0.1, {"evaluations": 7, "products": 5, "settings": "none"}

    monkeypatch.setattr(experiments, "METHODS", {"control": stopped_once})
    path = tmp_path / "records" / "table.csv"
    with pytest.raises(KeyboardInterrupt):
        compare(path, progress=lambda line: None)
    assert len(read(path)) == 4
    compare(path, progress=lambda line: None)
    rows = read(path)
    assert calls == [*list(DPS_GUIDANCE)[:3], *list(DPS_GUIDANCE)[2:]]
    assert [(r["task"], r["image"]) for r in rows] == [(t, i) for t in DPS_GUIDANCE for i in "01"]
    expected = image_metrics(faces + 0.1, faces)
    for row in rows:
        assert all(row[column] for column in COLUMNS)
        assert float(row["psnr"]) == pytest.approx(
            expected["psnr"][int(row["image"])].item(), abs=1e-4
        )
        assert row["evaluations"] == "7"


def test_another_table_is_not_overwritten(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of this version"):
        compare(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_readme_s_table_is_that_of_the_records():
    root = data_folder().parent
    rows, text = (
        read(root / "data" / "records" / "faces64_dps.csv"),
        (root / "README.md").read_text(),
    )
    for name in DPS_GUIDANCE:
        line = name.replace("_", " ").join(["| ", " |"])
        for method in ("control", "dps"):
            mine = [r for r in rows if (r["task"], r["method"]) == (name, method)]
            assert [r["image"] for r in mine] == [str(i) for i in range(16)]
            psnr, ssim = (sum(float(r[key]) for r in mine) / 16 for key in ("psnr", "ssim"))
            line += f" {psnr:.2f} / {ssim:.3f} | {mine[0]['evaluations']} |"
        assert line in text
    assert {r["prior"] for r in rows} == {
        "faces64 " + manifest_entry("faces64.safetensors")["sha256"][:12]
    }


def test_the_five_tasks_of_table_1_are_compared():
    assert list(DPS_GUIDANCE) == list(TASKS)[:5]
