"""The chain of the FFHQ tables from pictures to a table beside the paper's, rehearsed."""

import csv
import inspect
import json
import re
import shlex
import subprocess
from dataclasses import replace
from functools import wraps

import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from diffoc.baselines import Method, no_products
from diffoc.commands.ffhq import _out as out_of
from diffoc.commands.main import main, parser_of
from diffoc.data.provenance import ROOT
from diffoc.experiments import ffhq, preflight
from diffoc.experiments.cells import Computer, _generator, cells_of, load_once, work_of
from diffoc.experiments.ffhq import beside_the_paper, cells_by_line, lines, paper_numbers
from diffoc.experiments.methods import METHODS
from diffoc.experiments.preflight import (
    Report,
    check_images,
    check_weights,
    largest_batch,
    time_methods,
    try_constants,
)
from diffoc.experiments.protocol import FFHQ, FFHQ_PROTOCOLS, FFHQ_RELEASED
from diffoc.experiments.records import as_json, rows_of
from diffoc.priors.pretrained import REMOTE, load_prior
from diffoc.problem import Problem
from diffoc.problems.tasks import UnsupportedTask, measured

SMALL = "random ffhq256/32/64"


@pytest.fixture
def few(monkeypatch):
    """A table of two methods, one of ours and one of others."""
    kept = [line for line in lines("table3") if line.label.startswith(("Ours", "DDRM"))]
    monkeypatch.setattr(ffhq, "lines", lambda table: kept)


@pytest.mark.parametrize("table", ffhq.TABLES)
def test_rows_of_a_table_are_the_paper_s(table):
    own = {line.label for line in lines(table)} - {"Released code"}
    assert own == set(paper_numbers(table))
    assert {line.method for line in lines(table)} <= {"", *METHODS}


@pytest.mark.parametrize("table", ffhq.TABLES)
def test_every_cell_is_one_row_s_in_full_and_in_a_rehearsal(table):
    counts = []
    for smallest in (False, True):
        cells = cells_by_line(table, SMALL, ["a"], 1, "float32", smallest=smallest)
        places = [(line.label, cell.task) for cell, line in cells.items()]
        assert len(set(places)) == len(places)
        counts.append(len(places))
    runnable = sum(bool(line.method) for line in lines(table))
    assert counts == [runnable * len(ffhq.tasks_of(table))] * 2


def test_tables_share_their_rows():
    one, three = (set(cells_by_line(t, SMALL, ["a"], 1, "float32")) for t in ("table1", "table3"))
    assert three < one


def test_settings_are_those_of_the_authors_or_said_to_be_others(monkeypatch):
    for task, value in (("super_resolution", 0.3), ("box_inpainting", 0.5)):
        assert ffhq.published("dps", task)[0] == {"guidance": value}
    assert ffhq.published("mcg", "box_inpainting")[0] == {"guidance": 1.0, "strength": 1.0}
    text = beside_the_paper("table1", {}, "")
    borrowed = "tuned on 64x64 faces with 300 evaluations, not on FFHQ"
    for label in ("PNP-ADMM", "ADMM-TV"):
        assert f"- {label}: {borrowed}\n" in text + "\n"
    assert f"- MCG (NFE = 1000): {borrowed} (super_resolution, gaussian_blur, motion_blur)" in text
    assert "- DDRM (NFE = 1000): github.com/bahjat-kawar/ddrm" in text
    for method in ("ddrm", "ddnm"):
        assert "not published for FFHQ" in ffhq.published(method, "gaussian_blur")[1]
    own = {"ffhq256": {"mcg": {"motion_blur": {"1000": {"guidance": 0.7}}}}}
    monkeypatch.setattr(ffhq, "read_tuned", lambda: own)
    assert ffhq.published("mcg", "motion_blur") == (
        {"guidance": 0.7},
        "tuned on FFHQ with 1000 evaluations",
    )


def test_psld_has_a_row_where_its_model_was_put_and_otherwise_a_dash(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path))

    def rows(prior="ffhq256"):
        cells = cells_by_line("table1", prior, ["a"], 1, "float32", tasks=["super_resolution"])
        return {line.label: cell for cell, line in cells.items()}

    (missing,) = [line for line in lines("table1") if line.label.startswith("PSLD")]
    assert "fetch model.ckpt of https://ommer-lab.com/" in missing.note
    assert str(tmp_path) in missing.note
    assert not any("PSLD" in label or "Flash" in label for label in rows())
    with pytest.raises(FileNotFoundError, match=r"ffhq256_latent\.ckpt is missing"):
        load_prior("ffhq256_latent")
    (tmp_path / "ffhq256_latent.ckpt").touch()
    assert rows()["PSLD (NFE = 1000)"].prior == "ffhq256_latent"
    assert rows()["PSLD (NFE = 1000)"].keywords == {"guidance": 0.1, "gluing": 0.1, "steps": 1000}
    assert not any("PSLD" in label for label in rows(SMALL))  # a rehearsal has other sizes


def test_a_table_has_ours_the_paper_s_and_the_difference():
    found = {("Ours (T = 50)", "super_resolution"): {"psnr": 26.45, "mse_255": 147.0, "images": 3}}
    text = beside_the_paper("table3", found, "Protocol: one")
    assert text.startswith("Protocol: one\n")
    assert "| Ours (T = 50) | 3 | 26.45 (27.45) -1 | - (31.84) |" in text
    assert "147 (117) +30" in text
    # Failed images are in no mean, and a row says so.
    lost = {("Ours (T = 50)", "super_resolution"): 2, ("ADMM-TV", "motion_blur"): 5}
    text = beside_the_paper("table3", found, "", lost)
    assert "| Ours (T = 50) | 3 + 2 failed | 26.45" in text
    assert "| ADMM-TV | - + 5 failed | - (" in text
    found["Ours (T = 50)", "motion_blur"] = {"images": 4}
    text = beside_the_paper("table3", found, "", lost)
    assert "| Ours (T = 50) | 3 + 2 failed, -, -, -, 4 | 26.45" in text


def test_the_chain_and_its_resumption(few, tmp_path, capsys):
    command = ["ffhq", "table3", "--rehearse", "--prior", "ffhq256/32/64", "--first", "2"]
    command += ["--tasks", "gaussian_blur", "--out", str(tmp_path)]
    assert main(command) == 0
    text = (tmp_path / "table3.md").read_text()
    assert text.startswith("A REHEARSAL")
    with (tmp_path / "table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    records = (tmp_path / "records.csv").read_text()
    assert records.count(FFHQ.name) == 4
    for said in (FFHQ.name, "the first 2 by name", "filter lanczos", "seed 0", "in float32"):
        assert said in text
    assert "| Ours (T = 50) | 2 | " in text
    assert [row["image"] for row in rows] == ["00000", "00001", "mean"] * 2
    mean = sum(float(row["psnr"]) for row in rows[:2]) / 2
    assert float(rows[2]["psnr"]) == pytest.approx(mean, rel=1e-5)
    # Right of a white margin with the labels of the rows, each pixel is twice as large.
    drawn = Image.open(tmp_path / "table3-gaussian_blur.png")
    margin = drawn.width - 2 * 128
    assert drawn.height == 3 * 128
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    for row in range(3):
        assert drawn.convert("L").crop((0, 128 * row, margin, 128 * (row + 1))).getextrema()[0] < 64
    original = Image.open(next(tmp_path.glob("originals-*")) / "00000.png")
    assert (
        drawn.crop((margin, 0, margin + 128, 128)).tobytes()
        == original.resize((128, 128), 0).tobytes()
    )
    before = (tmp_path / "records.csv").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert "no lpips_alex" in capsys.readouterr().out
    assert main([*command, "--protocol", "released"]) == 2  # a table has one protocol
    assert "name another folder with --out" in capsys.readouterr().err
    assert (tmp_path / "records.csv").read_bytes() == before


def test_preflight_refuses_what_would_fail(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (256, 256)).save(pictures / "a.png")
    command = ["preflight", "--images", str(pictures), "--out", str(tmp_path / "out")]
    tiny = [*command, "--prior", "ffhq256/32/64", "--random-weights", "--tasks", "gaussian_blur"]
    assert main(tiny) == 0
    said = capsys.readouterr().out
    assert "images: 1: 1 .png of 256x256" in said
    assert "hours of this CPU" in said

    class Broken(preflight.Computer):
        def __call__(self, cell):
            raise RuntimeError("broken")

    monkeypatch.setattr(preflight, "Computer", Broken)
    assert main(tiny) == 1
    said = capsys.readouterr().out
    assert "WOULD FAIL: Ours (T = 50), gaussian_blur: RuntimeError('broken')" in said
    assert main(command) == 1  # without weights; the images are looked at all the same
    said = capsys.readouterr().out
    assert "ffhq_10m.pt is missing" in said
    assert "images: 1: 1 .png of 256x256" in said


def test_weights_are_compared_with_those_of_the_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path))
    report = Report()
    check_weights("ffhq256", report)
    assert str(tmp_path) in report.refused[0]
    path = tmp_path / REMOTE["ffhq256"].name
    for content, refused in ((b"one", 0), (b"one", 0), (b"two", 1)):
        path.write_bytes(content)
        check_weights("ffhq256", report := Report())
        assert len(report.refused) == refused


def test_pictures_that_do_not_fit_are_refused_one_line_each(tmp_path):
    for name, size in (("a", (64, 64)), ("b", (64, 80)), ("c", (32, 32))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no picture")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "e.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "f.png")
    report = Report()
    check_images(sorted(tmp_path.iterdir()), 64, report)
    for name, line in zip("bcde", report.refused, strict=True):
        assert f"{name}.png" in line
    assert "1 .png of 64x64; 1 .png of 64x64, composited over white" in report.lines[0]


@pytest.mark.parametrize(("recomputed", "kept"), [(6, 1), (1, 0), (0, 0)])
def test_the_largest_batch_is_found_by_trying(recomputed, kept):
    """A card, for once a stand-in, on which so many images fit."""
    cells = cells_by_line("table1", SMALL, ["a"], 1, "float32", tasks=["super_resolution"])
    (cell,) = [cell for cell, line in cells.items() if line.label == "Ours (NFE = 2500)"]
    tried = []

    class Card:
        device = "cuda"

        def __call__(self, cell):
            inspect.signature(METHODS[cell.method].run).bind_partial(**cell.keywords)
            keep = cell.keywords["keep_activations"]
            tried.append((keep, len(cell.images), cell.keywords["iterations"]))
            if len(cell.images) > (kept if keep else recomputed):
                raise torch.OutOfMemoryError("CUDA out of memory")

    largest_batch(cell, Card(), ["a", "b"], report := Report())
    found = [line.rpartition(": ")[2] for line in report.lines]
    assert found == [str(2 ** (n.bit_length() - 1) if n else 0) for n in (recomputed, kept)]
    assert bool(report.refused) == (recomputed == 0)
    assert {iterations for *_, iterations in tried} == {1}


class Clock:
    """A machine on which the first run of a cell takes 60 s more, and ADMM-TV 1000 s."""

    device = "cpu"

    def __init__(self):
        self.seen = set()

    def __call__(self, cell):
        evaluations, products = work_of(cell)
        seconds = 2 * (0.1 * evaluations + 0.2 * products) if evaluations else 1000.0
        seconds += 60.0 * (cell not in self.seen)
        self.seen.add(cell)
        if (cell.method, cell.task) == ("ddrm", "motion_blur"):
            raise UnsupportedTask("not separable")
        counts = {"evaluations": evaluations, "products": products}
        return [{"seconds": f"{seconds}"} | {k: f"{v}" for k, v in counts.items()}], None


def test_hours_are_those_of_a_row_s_own_method_and_task(monkeypatch):
    """No other method's seconds, and nothing that is done once, is taken to the full counts."""
    monkeypatch.setattr(preflight, "time_prior", lambda *_: (0.1, 0.2))
    small = cells_by_line("table1", SMALL, ["a"], 1, "float32", smallest=True)
    times = time_methods(small, Clock(), Report())
    for table in ffhq.TABLES:
        for cell in cells_by_line(table, SMALL, ["a"], 1, "float32"):
            evaluations, products = work_of(cell)
            expected = 2 * (0.1 * evaluations + 0.2 * products) if evaluations else 1000
            if (cell.method, cell.task) == ("ddrm", "motion_blur"):
                expected = 0
            assert times.of(cell) == pytest.approx(expected), cell


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("prior", [SMALL, "ffhq256"])
def test_the_rows_own_constants_are_tried_where_they_can_be(prior, device):
    cells = cells_by_line("table1", prior, ["a"], 1, "float32", tasks=["gaussian_blur"])
    tried = []

    class Card:
        def __call__(self, cell):
            tried.append((cell.method, cell.keywords))
            raise ValueError("Quu is not positive definite")

    card = Card()
    card.device = device
    try_constants(cells, card, report := Report())
    if (prior, device) != ("ffhq256", "cuda"):
        assert not tried
        assert "not tried" in report.lines[0]
        return
    ours = [c for c in cells if METHODS[c.method].recipe]
    assert tried == [(c.method, c.keywords | {"iterations": 1}) for c in ours]
    assert len(report.refused) == len(ours) == 3
    assert "Ours (NFE = 1000), gaussian_blur, one iteration: ValueError" in report.refused[1]


def test_originals_in_many_formats_become_one_folder(few, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    picture = Image.fromarray(
        (255 * torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    )
    picture.save(tmp_path / "a" / "00001.jpg")
    picture.save(tmp_path / "a" / "b" / "00000.png")
    command = [
        "ffhq",
        "table3",
        "--rehearse",
        "--prior",
        "ffhq256/32/64",
        "--images",
        str(tmp_path),
    ]
    command += ["--tasks", "gaussian_blur", "--out", str(tmp_path / "out"), "--shard", "1/2"]
    assert main(command) == 0
    (folder,) = (tmp_path / "out").glob("originals-*")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    expected = picture.resize((64, 64), Image.Resampling.LANCZOS)
    with Image.open(folder / "00000.png") as found:
        assert found.tobytes() == expected.tobytes()


def test_the_two_protocols_differ_in_what_is_dropped_and_drawn():
    """The paper's text has 92 %; the released code 30 to 70 %, uniformly, and the same boxes."""
    shape, count = (3, 64, 64), 200

    def masks(protocol, name="random_inpainting"):
        generators = (torch.Generator().manual_seed(i) for i in range(count))
        return torch.cat([protocol.operator(name, shape, g).mask for g in generators])

    dropped = 1 - masks(FFHQ).mean((1, 2, 3))
    torch.testing.assert_close(dropped, torch.full((count,), 0.92), rtol=0, atol=1e-3)
    dropped = 1 - masks(FFHQ_RELEASED).mean((1, 2, 3))
    assert dropped.min() >= 0.3 - 1e-3
    assert dropped.max() <= 0.7 + 1e-3
    # Uniform: five standard errors of the mean and of the variance.
    assert abs(dropped.mean() - 0.5) < 5 * 0.4 / (12 * count) ** 0.5
    assert dropped.var() == pytest.approx(0.4**2 / 12, rel=5 * (0.8 / count) ** 0.5)
    assert torch.equal(masks(FFHQ, "box_inpainting"), masks(FFHQ_RELEASED, "box_inpainting"))


@pytest.mark.parametrize("name", ["random_inpainting", "box_inpainting", "motion_blur"])
@pytest.mark.parametrize("protocol", [FFHQ, FFHQ_RELEASED])
def test_each_image_is_measured_as_its_protocol_says(name, protocol, tmp_path, monkeypatch):
    """The same image has the same operator in any batch, from a named seed; others have others."""
    seen = []

    def look(prior, physics, y, x, generator, *, noise_std):
        seen.append((physics, y))
        return torch.zeros_like(x)

    monkeypatch.setitem(METHODS, "look", Method("", look, lambda *_: {}, no_products))
    for i, grey in enumerate((60, 200)):
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(tmp_path / f"{i}.png")
    compute = Computer(tmp_path, protocol=protocol)

    def rows(images, seed=0):
        (cell,) = cells_of(SMALL, [name], ["look"], [1], [seed], images, 8, "float32")
        return compute(cell)[0]

    (one, two), (alone,), (other, _) = (
        rows(["0.png", "1.png"]),
        rows(["1.png"]),
        rows(["0.png", "1.png"], seed=1),
    )
    assert alone["operator"] == two["operator"]
    assert one["operator"] != other["operator"]
    own = name != "motion_blur" or protocol is FFHQ
    assert (one["operator"] != two["operator"]) == own
    assert {row["protocol"] for row in (one, two, alone, other)} == {protocol.name}
    physics, y = seen[0]
    if name != "motion_blur":
        noise = (y - physics.A(y))[measured(physics, y) == 0]
        expected = 0.05 * protocol.noise_on_dropped
        assert noise.square().mean().sqrt() == pytest.approx(expected, rel=0.05)
    # The truth's residual is the noise's, in either case.
    truth = torch.stack([torch.full((3, 64, 64), grey / 127.5 - 1) for grey in (60, 200)])
    residual = (physics.A(truth) - y).square().mean().sqrt()
    level = Problem(physics, y, 0.05).noise_level
    assert residual == pytest.approx(level[0].item(), rel=0.05)


PAGE = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
SPANS = re.findall(r"`([^`]+)`", PAGE)
MADE = [span for span in SPANS if span.startswith("make ffhq")]
MADE += [f"make ffhq-table1 IMAGES=DIR {s}" for s in SPANS if s.startswith(("ARGS=", "GPUS="))]
TYPED = [span for span in SPANS if " -m diffoc " in span]


@pytest.mark.parametrize("command", [*MADE, *TYPED])
def test_commands_of_the_page_are_commands(command):
    """Those of make become what its rules would run; each is one that the command line knows."""
    lines = [command]
    if command.startswith("make"):
        stamp = ["VENV=.venv", "-o", ".venv/.diffoc-installed", "-n"]
        made = ["make", *stamp, *shlex.split(command)[1:]]
        lines = subprocess.run(made, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        lines = [line for line in lines.splitlines() if " -m diffoc " in line]
        assert bool(lines) == (command != "make ffhq")
    for line in lines:
        program, _, words = line.partition(" -m diffoc ")
        assert program == ".venv/bin/python"
        parser_of().parse_args(shlex.split(words))  # exits where it does not know one


def test_the_page_has_every_command_and_says_that_none_was_run_on_a_gpu():
    assert "**None of it was ever run on a GPU**" in PAGE
    commands = " ".join([*MADE, *TYPED])
    for table in ("preflight", "figures", *ffhq.TABLES):
        assert f"make ffhq-{table} IMAGES=DIR" in commands
    for name in ("ffhq256_latent.ckpt", *(file.name for file in (REMOTE["ffhq256"],))):
        assert f"`{name}`" in PAGE
    for option, protocol in FFHQ_PROTOCOLS.items():
        assert f"`--protocol {option}`" in PAGE
        assert protocol.name in (ROOT / "docs" / "protocol.md").read_text().replace("\n", " ")


def test_sets_that_are_equal_have_no_distance(few, tmp_path, monkeypatch, capsys):
    """The command `measure` on copies of the originals: FID 0, whatever the network and parts."""

    class Network(torch.nn.Module):
        def forward(self, pixels):
            return torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)

    monkeypatch.setattr("diffoc.problems.perceptual.inception", Network)
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        pixels = (255 * torch.rand(32, 32, 3, generator=generator)).byte().numpy()
        for folder, ending in (("truth/a", "png"), ("kept/one", "png"), ("kept/two", "png")):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            shift = 40 if folder == "kept/two" else 0
            Image.fromarray(pixels // 2 + shift).save(tmp_path / folder / f"{i:05d}.{ending}")
    command = ["measure", str(tmp_path / "kept"), "--images", str(tmp_path / "truth")]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "part 1 of 2 measured" in capsys.readouterr().out
    assert main([*command, "--shard", "2/2"]) == 0
    with (tmp_path / "kept-measured" / "measured.csv").open() as file:
        means = {row["set"]: row for row in csv.DictReader(file) if row["image"] == "mean"}
    assert abs(float(means["one"]["fid_png"])) < 1e-6
    assert abs(float(means["one"]["fid_jpeg"])) < 1e-6
    # Means that are moved by d in each of n features have the distance n d^2.
    assert float(means["two"]["fid_png"]) == pytest.approx(12 * (40 / 255) ** 2, rel=1e-3)
    assert float(means["two"]["mse_255"]) == pytest.approx(40**2, rel=1e-5)


def test_parts_find_each_other_wherever_the_folders_are(few, tmp_path, capsys):
    """Two machines see the same files in other places; files of other content are others."""
    pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(0)).byte()
    for machine in ("one", "two"):
        for folder in ("truth", "kept/set"):
            (tmp_path / machine / folder).mkdir(parents=True)
            for i in range(2):
                path = tmp_path / machine / folder / f"{i}.png"
                Image.fromarray((pixels + i).numpy()).save(path)

    def part(machine, i):
        command = ["measure", str(tmp_path / machine / "kept"), "--shard", f"{i}/2"]
        command += ["--images", str(tmp_path / machine / "truth"), "--out", str(tmp_path / "out")]
        assert main(command) == 0
        return capsys.readouterr().out

    assert "part 1 of 2 measured" in part("one", 1)
    assert "set: 2 images" in part("two", 2)
    Image.fromarray((pixels + 9).numpy()).save(tmp_path / "two" / "kept" / "set" / "0.png")
    assert "part 2 of 2 measured" in part("two", 2)
    (tmp_path / "two" / "truth" / "1.png").unlink()
    command = ["measure", str(tmp_path / "two" / "kept"), "--images", str(tmp_path / "two/truth")]
    assert main(command) == 2
    assert "images has no original of 1: expected one picture" in capsys.readouterr().err


def test_rows_that_failed_are_counted_and_the_way_to_try_again_is_said(few, tmp_path, capsys):
    command = ["ffhq", "table3", "--rehearse", "--prior", "ffhq256/32/64", "--first", "2"]
    command += ["--tasks", "super_resolution", "--out", str(tmp_path)]
    broken = METHODS["ddrm"]

    @wraps(broken.run)
    def run(*given, **settings):
        raise RuntimeError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ddrm", replace(broken, run=run))
        assert main(command) == 1
    said = capsys.readouterr().out
    assert "2 rows failed: the same command with --retry-failed computes them again" in said
    assert "| DDRM (T = 1000) | - + 2 failed | - (" in (tmp_path / "table3.md").read_text()
    assert main([*command, "--retry-failed"]) == 0
    assert "| DDRM (T = 1000) | 2 | " in (tmp_path / "table3.md").read_text()


def test_the_released_code_s_row_has_the_variance_of_its_prior_s_head(tmp_path):
    """The cell's setting asks for the head, which the other rows' prior does not have."""
    generator = torch.Generator().manual_seed(0)
    pixels = (255 * torch.rand(64, 64, 3, generator=generator)).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = {"tasks": ["super_resolution"], "smallest": True}
    cells = cells_by_line("table1", SMALL, ["a.png"], 1, "float32", **options)
    (cell,) = [cell for cell, line in cells.items() if line.label == "Released code"]
    assert cell.keywords["learned_variance"] is True
    small = replace(cell, settings=as_json(cell.keywords | {"learned_variance": False}))
    compute = Computer(tmp_path)
    (learned, x), (without, z) = compute(cell), compute(small)
    assert not torch.equal(x, z)
    assert learned[0]["weights_sha256"] != without[0]["weights_sha256"]
    assert load_once(SMALL, "cpu")[0].backbone.out[2].weight.shape[0] == 3
    other = cells_by_line("table1", "faces64", ["a"], 1, "float32", **options)
    assert not any(one.keywords.get("learned_variance") for one in other)


def test_a_rehearsal_writes_no_file_of_a_real_run():
    def folders(*words):
        stamp = ["VENV=.venv", "-o", ".venv/.diffoc-installed", "-n", "IMAGES=DIR"]
        made = ["make", *stamp, *words]
        text = subprocess.run(made, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        (line,) = [line for line in text.splitlines() if " -m diffoc " in line]
        args = parser_of().parse_args(shlex.split(line.partition(" -m diffoc ")[2]))
        args.random_weights |= args.rehearse
        return out_of(args)

    for target in ("preflight", "figures", *ffhq.TABLES):
        assert folders(f"ffhq-{target}") != folders(f"ffhq-{target}", "REHEARSE=1")


def test_the_page_s_kernel_is_the_one_of_the_seed():
    """The effective pixels of the one motion kernel that the released protocol has at 256."""
    generator = _generator(0, "motion_blur")
    kernel = FFHQ_RELEASED.operator("motion_blur", (3, 256, 256), generator).filter
    assert f"has {1 / kernel.square().sum():.0f} effective pixels" in PAGE


@pytest.mark.parametrize(
    ("notebook", "cells", "record"),
    [
        ("09_inverse_problems", ("cell-02", "cell-09", "cell-19"), "table1"),
        ("12_few_steps", ("few-02", "few-09", "few-ffhq"), "few_steps"),
    ],
)
def test_notebooks_show_ffhq_rows_once_there_are_records(
    notebook, cells, record, tmp_path, monkeypatch, capsys
):
    """With the records of faces in their place: what is shown is that many images."""
    monkeypatch.setenv("DIFFOC_FIGURES", str(tmp_path))
    text = (ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
    sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(text)["cells"]}
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: True)
    names = {}
    with rc_context():  # a notebook sets its style for good
        for cell in cells[:-1]:
            exec(sources[cell], names)
        shown = names["folder"] / f"{record}_faces64.csv"
        (tmp_path / f"{record}_ffhq256.csv").write_bytes(shown.read_bytes())
        names["folder"] = tmp_path
        names["display"] = lambda *shown: print(*(getattr(one, "data", "") for one in shown))
        capsys.readouterr()
        exec(sources[cells[-1]], names)
    printed = capsys.readouterr().out
    assert "nothing was run" not in printed
    assert f"{len(set(rows_of(shown)['image']))} images" in printed
