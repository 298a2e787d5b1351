"""Full disks, damaged files, and files that would run code or write where they should not."""

import ast
import json
import math
import pickle
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save

import diffoc
import notebooks
from diffoc import figures
from diffoc.commands.main import main
from diffoc.commands.solve import Settings, from_measurement
from diffoc.data import images as data
from diffoc.data import manifest
from diffoc.data.files import replacing
from diffoc.data.pictures import read_picture, write_picture
from diffoc.experiments import ledger
from diffoc.experiments.cells import keep_in
from diffoc.experiments.methods import write_tuned
from diffoc.experiments.records import REQUIRED, Cell, as_json, read
from diffoc.experiments.runs import run_cells
from diffoc.priors.networks import DigitClassifier
from diffoc.priors.pretrained import load_prior
from diffoc.priors.weights import read_weights, write_weights
from diffoc.training import trainer as training
from diffoc.training.mixtures import MIXTURES

# Full disks: what was there stays, and the message says which file could not be written.


def network(seed):
    torch.manual_seed(seed)
    return DigitClassifier()


def drawing(seed):
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(seed).normal(size=50))
    return figure


def noise(seed):
    return 2 * torch.rand(1, 30, 30, generator=torch.Generator().manual_seed(seed)) - 1


WRITERS = {
    "classifier.safetensors": lambda f, seed: write_weights(network(seed), "classifier", f),
    "manifest.json": lambda f, seed: manifest.register_file("a", str(seed), "here", f),
    "tuned.json": lambda f, seed: write_tuned({"seed": seed}, f / "tuned.json"),
    "run.pt": lambda f, seed: training.save(
        training.start(training.Plan(DigitClassifier, images=1), seed), f / "run.pt"
    ),
    "a.png": lambda f, seed: write_picture(noise(seed), f / "a.png"),
    "drawing.png": lambda f, seed: figures.save(drawing(seed), "drawing"),
    "drawing.pdf": lambda f, seed: figures.save_for_print(drawing(seed), "drawing", ["a.csv"], f),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_the_old_file_stays(name, tmp_path, full_disk, monkeypatch):
    monkeypatch.setenv("DIFFOC_FIGURES", str(tmp_path))
    (tmp_path / "a").write_text("what is registered")
    write, path = WRITERS[name], tmp_path / name
    write(tmp_path, 1)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for limit in (0, len(before[path]) // 2):
        with full_disk(limit), pytest.raises(OSError, match=f"{name} could not be written"):
            write(tmp_path, 2)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    write(tmp_path, 2)
    assert path.read_bytes() != before[path]


def test_two_that_write_the_same_file_at_once_both_succeed(tmp_path):
    path = tmp_path / "a.png"
    with replacing(path) as one, replacing(path) as two:
        assert one.suffix == two.suffix == path.suffix
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # of the one that ended last, and whole
    assert list(tmp_path.iterdir()) == [path]


def test_on_a_full_disk_a_notebook_stays_as_it_was(tmp_path, full_disk):
    path = tmp_path / "00_a.ipynb"
    cells = [nbformat.v4.new_code_cell("print('long' * 2000)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    with full_disk(7000), pytest.raises(OSError, match=r"00_a\.ipynb could not be written"):
        notebooks.execute([path], in_place=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


CELL = Cell("none", "float32", "task", "method", 3, as_json({}), 0, ("a.png", "b.png"))
CELLS = [replace(CELL, seed=seed) for seed in range(4)]


def compute(cell):
    return [dict.fromkeys(REQUIRED, str(cell.seed + i)) for i in range(2)], None


def test_a_table_on_a_full_disk_keeps_whole_cells_and_is_gone_on_with(tmp_path, full_disk):
    expected = tmp_path / "expected.csv"
    run_cells(CELLS, compute, expected, progress=False)
    whole = [row["psnr"] for rows in read(expected).values() for row in rows]
    lines = expected.read_bytes().splitlines(keepends=True)
    # The header, and two rows for each of the four cells; before the first there is nothing.
    ends = {0, *(len(b"".join(lines[: 1 + 2 * cells])) for cells in range(1, 5))}
    size, path = expected.stat().st_size, tmp_path / "table.csv"
    done = 0
    for limit in [*range(0, size, size // 9), size - 1]:
        with full_disk(limit), pytest.raises(OSError, match=r"table\.csv could not be written"):
            run_cells(CELLS, compute, path, progress=False)
        content = path.read_bytes() if path.exists() else b""
        assert len(content) in ends
        assert content == expected.read_bytes()[: len(content)]
        found = len(read(path)) if content else 0
        assert found >= done
        done = found
    assert done == 3
    run_cells(CELLS, compute, path, progress=False)
    assert [row["psnr"] for rows in read(path).values() for row in rows] == whole
    assert path.stat().st_size == size


def test_the_command_line_says_what_could_not_be_written(tmp_path, full_disk, capsys):
    write_picture(data.digits()[0][0], tmp_path / "a.png")
    command = ["solve", str(tmp_path / "a.png"), "--task", "super_resolution", "--prior", "mnist"]
    command += ["--steps", "2", "--iterations", "0", "--out", str(tmp_path / "solved")]
    with full_disk(100):
        assert main(command) == 2
    assert "diffoc: " in (error := capsys.readouterr().err)
    assert "measurement.npz could not be written" in error
    assert list((tmp_path / "solved").iterdir()) == []


# Files that run code when a careless reader opens them.


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A diffusers pipeline with an untrained network."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(
        8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 32), **blocks
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    assert load_prior(folder).image_shape == (1, 8, 8)
    return folder


@pytest.fixture
def pipeline(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


def as_bin(folder, touch):
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": touch}, (folder / WEIGHTS).with_suffix(".bin"))
    load_prior(folder)


def as_safetensors(folder, touch):
    (folder / WEIGHTS).write_bytes(pickle.dumps(touch))
    load_prior(folder)


def as_weights(folder, touch):
    (folder / "a.safetensors").write_bytes(pickle.dumps(touch))
    read_weights(folder / "a.safetensors")


def as_checkpoint(folder, touch):
    (folder / "a.pt").write_bytes(pickle.dumps(touch, protocol=2))
    load_prior(folder / "a.pt")


def as_pickle(folder, touch):
    (folder / "a.pkl").write_bytes(pickle.dumps({"ema": touch}))
    load_prior(folder / "a.pkl")


def as_measurement(folder, touch):
    y = np.full((1, 1, 7, 7), touch, dtype=object)
    np.savez(folder / "a.npz", y=y, task="super_resolution", seed=0)
    from_measurement(folder / "a.npz", (1, 28, 28), Settings("super_resolution", "mnist"))


def as_faces(folder, touch):
    np.savez(folder / "faces64.npz", test=np.full((2, 64, 64), touch, dtype=object))
    data.faces("test", root=folder)


def as_ledger(folder, touch):
    path = touch.path
    (folder / "a.yaml").write_text(f"!!python/object/apply:builtins.open [{path!r}, w]\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.full_load((folder / "a.yaml").read_text())
    ledger.read(folder / "a.yaml")


@pytest.mark.parametrize(
    "place",
    [
        as_bin,
        as_safetensors,
        as_weights,
        as_checkpoint,
        as_pickle,
        as_measurement,
        as_faces,
        as_ledger,
    ],
)
def test_no_file_runs_code(place, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"damaged|name_or_path|a\.yaml"):
        place(pipeline, Touch(tmp_path / "touched"))
    assert not (tmp_path / "touched").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "evil.Evil"},
        {"_class_name": ["evil", "Evil"]},
        {"down_block_types": ["evil.Evil", "DownBlock2D"]},
        {"auto_map": {"AutoModel": "evil.Evil"}, "down_block_types": ["Evil", "DownBlock2D"]},
    ],
)
def test_no_code_comes_with_a_model(changes, pipeline, tmp_path, monkeypatch):
    for folder in (pipeline, pipeline / "unet"):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    monkeypatch.chdir(pipeline)
    edit(pipeline / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=r"unet holds|setting auto_map"):
        load_prior(pipeline)
    assert not (tmp_path / "touched").exists()


# Damage


def without_a_number(folder):
    edit(folder / "unet" / "config.json", sample_size="large")


def without_settings(folder):
    (folder / "unet" / "config.json").write_text("[]")


def with_levels_that_fall(folder):
    edit(folder / "scheduler" / "scheduler_config.json", beta_start=0.02, beta_end=-0.1)


def with_no_levels(folder):
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="evil")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_a_number, "sample_size is 'large'"),
        (without_settings, r"config\.json is damaged"),
        (with_levels_that_fall, "scheduler has betas"),
        (with_no_levels, "scheduler has the scheduler DDPMScheduler, whose settings make no betas"),
    ],
)
def test_a_damaged_model_is_told_from_a_whole_one(damage, says, pipeline):
    damage(pipeline)
    with pytest.raises(ValueError, match=says):
        load_prior(pipeline)


def test_a_measurement_that_is_cut_or_another_file_is_refused(tmp_path):
    path, settings = tmp_path / "a.npz", Settings("super_resolution", "mnist")
    np.savez(path, y=np.zeros((1, 1, 7, 7)), task="super_resolution", seed=0)
    whole = path.read_bytes()
    assert from_measurement(path, (1, 28, 28), settings).y.shape == (1, 1, 7, 7)
    np.save(tmp_path / "b.npy", np.zeros(3))
    cut = [whole[:size] for size in range(0, len(whole), 50)]
    for content in (*cut, (tmp_path / "b.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            from_measurement(path, (1, 28, 28), settings)
    for y in (np.full((1, 1, 7, 7), np.nan), np.full((1, 1, 7, 7), 1j), np.zeros(())):
        np.savez(path, y=y, task="super_resolution", seed=0)
        with pytest.raises(ValueError, match="expected finite"):
            from_measurement(path, (1, 28, 28), settings)


def test_pictures_that_are_too_large_or_no_numbers_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="not finite"):
        read_picture(tmp_path / "a.tif", (1, 8, 8))
    write_picture(noise(0), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30 // 3)
    with pytest.raises(ValueError, match="too large"):
        read_picture(tmp_path / "a.png", (1, 8, 8))
    with pytest.raises(ValueError, match="shape is"):
        read_picture(tmp_path / "a.png", (1, 0, 8))


# Places


def test_reconstructions_stay_in_their_folder(tmp_path):
    names = ("../../../a.png", str(tmp_path / "b.png"), "c.png", "..")
    keep = keep_in(tmp_path / "kept")
    keep(replace(CELL, images=names), torch.zeros(4, 1, 9, 9))
    (place,) = (tmp_path / "kept" / "task").iterdir()
    assert place.name.startswith("method-3-0-")
    found = sorted(path.relative_to(place).as_posix() for path in tmp_path.rglob("*.png"))
    assert found == ["...png", "a.png", "b.png", "c.png"]


def test_reconstructions_of_other_settings_replace_none(tmp_path):
    keep, cell = keep_in(tmp_path), replace(CELL, images=("a.png",))
    changes = {"prior": "other", "task": "b", "method": "b", "nfe": 4, "settings": '{"b": 1}'}
    cells = [cell, *(replace(cell, **{key: new}) for key, new in (changes | {"seed": 1}).items())]
    for cell in cells:
        keep(cell, torch.zeros(1, 1, 9, 9))
    assert len(list(tmp_path.rglob("a.png"))) == len(cells) == 7


def test_a_prior_s_name_makes_no_path(monkeypatch, capsys):
    """Tables are called after their prior, which may be a path or "owner/name"."""
    from diffoc.commands import tables
    from diffoc.experiments import cells as experiments

    places = []
    monkeypatch.setattr(
        tables, "execute", lambda cells, compute, path, *a: places.append(path) or 0
    )
    monkeypatch.setattr(experiments, "load_once", lambda prior, device: None)
    monkeypatch.setattr(tables, "_cells", lambda args, images: (args.prior, []))
    monkeypatch.setattr(experiments, "tuning_cells", lambda *a: [])
    monkeypatch.setattr(experiments, "best_trial", lambda rows: None)
    monkeypatch.setattr("diffoc.experiments.records.read", lambda path: {})
    monkeypatch.setattr("diffoc.experiments.methods.write_tuned", lambda *a: None)
    for prior in ("../../elsewhere", "/etc/passwd", "owner/name"):
        main(["run", "table1", "--prior", prior])
        main(["tune", "dps", "--prior", prior])
    records = manifest.data_folder() / "records"
    assert len(places) == 6
    assert {path.resolve().parent for path in places} == {records}
    assert places[0].name == "table1_.._.._elsewhere.csv"


def test_weights_have_names_of_ours(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("../out", "cifar"):
        with pytest.raises(ValueError, match="name is"):
            write_weights(DigitClassifier(), name, tmp_path / "in")
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


def test_a_downloaded_archive_that_points_outside_is_refused(tmp_path, monkeypatch):
    """The one archive that is unpacked on our behalf, by scikit-learn."""
    pytest.importorskip("sklearn", reason="pip install -e '.[train]'")
    monkeypatch.delenv("DIFFOC_DATA", raising=False)
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "datasets" / "lfw_home"
    home.mkdir(parents=True)
    for name in ("pairs.txt", "pairsDevTrain.txt", "pairsDevTest.txt"):
        (home / name).touch()  # nothing is left to be downloaded
    with tarfile.open(home / "lfw-funneled.tgz", "w:gz") as archive:
        for member in ("harmless", "../../../escaped"):
            archive.addfile(tarfile.TarInfo(member))
    with pytest.raises(FileNotFoundError, match=r"faces64\.npz cannot be downloaded .*outside"):
        data.faces("test")
    assert (home / "harmless").exists()
    assert not (tmp_path / "escaped").exists()


def test_no_archive_is_unpacked_by_us():
    """What torchvision and scikit-learn download they check and unpack themselves."""
    unpackers = {"tarfile", "zipfile", "extractall", "extract", "unpack_archive"}
    for path in Path(diffoc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")}
            names |= {getattr(node, key, None) for key in ("id", "attr", "module")} - {None}
            assert not names & unpackers, path.name


# Devices, interrupts, and weights that nothing has taught


@pytest.mark.parametrize(
    ("device", "said"),
    [
        *((name, "expected cpu, cuda") for name in ("foo", "", "mps", "meta", "xla")),
        ("cuda:9", "torch sees"),
    ],
)
@pytest.mark.parametrize("command", ["solve", "run", "tune", "check", "benchmark", "train"])
def test_devices_that_are_not_there_are_a_line(command, device, said, capsys):
    needed = {
        "solve": ["a.png", "--task", "gaussian_blur"],
        "run": ["table1"],
        "tune": ["dps"],
        "check": ["a.csv"],
        "benchmark": [],
        "train": ["mnist"],
    }
    assert main([command, *needed[command], "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffoc: device is")
    assert said in error
    assert error.count("\n") == 1


def test_an_interrupt_is_a_line(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffoc.experiments.records.read", interrupt)
    assert main(["table", "records.csv"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    write_weights(network(0), "classifier", tmp_path)
    before = (tmp_path / "classifier.safetensors").read_bytes()
    broken = network(1)
    broken.head.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        write_weights(broken, "classifier", tmp_path)
    assert (tmp_path / "classifier.safetensors").read_bytes() == before


def test_a_training_that_has_seen_nothing_writes_nothing(tmp_path, monkeypatch, capsys):
    images = np.zeros((40, 28, 28), np.uint8)
    monkeypatch.setattr("diffoc.data.images.mnist", lambda split: (images, np.arange(40) % 10))
    checkpoint = tmp_path / "run.pt"
    command = ["train", "judge", "--out", str(tmp_path), "--checkpoint", str(checkpoint)]
    assert main([*command, "--images", "0"]) == 2
    assert "images is 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    checkpoint.write_bytes(b"a checkpoint")
    assert main([*command, "--seed", "1"]) == 2
    assert "seed and init are of a new run" in capsys.readouterr().err


@pytest.fixture
def twenty_digits(monkeypatch):
    """The shipped digits in MNIST's place, for networks and mixtures."""
    x, labels = diffoc.data.digits()
    images = ((x[:, 0] + 1) * 127.5).round().byte().numpy()
    for module in ("data.images", "training.mixtures"):
        monkeypatch.setattr(f"diffoc.{module}.mnist", lambda split: (images, labels.numpy()))


TRAINERS = {
    "beside": ("judge", ["train", "judge", "--images", "64", "--checkpoint", "OUT/../run.pt"]),
    # What the checkpoint's folder has is no less worth keeping.
    "inside": ("judge", ["train", "judge", "--images", "64", "--checkpoint", "OUT/run.pt"]),
    "fit": ("mixture_mnist", ["fit", "mnist"]),
}


@pytest.mark.parametrize("writer", TRAINERS)
def test_worse_weights_are_written_beside_those_that_they_would_replace(
    writer, tmp_path, monkeypatch, twenty_digits, capsys
):
    name, command = TRAINERS[writer]

    def run(out, rank):
        monkeypatch.setitem(MIXTURES, "mnist", MIXTURES["mnist"]._replace(components=1, rank=rank))
        status = main([*(word.replace("OUT", str(out)) for word in command), "--out", str(out)])
        return status, (out / f"{name}.safetensors").read_bytes()

    (alone, out) = (tmp_path / "alone" / "out", tmp_path / "both" / "out")
    assert run(alone, 1)[0] == 0
    poor = (alone / f"{name}.safetensors").read_bytes()
    if writer == "fit":
        assert run(out, 5)[0] == 0
    else:
        out.mkdir(parents=True)
        shutil.copy(manifest.data_folder() / f"{name}.safetensors", out)
    good = (out / f"{name}.safetensors").read_bytes()
    capsys.readouterr()
    assert run(out, 1) == (2, good)
    assert re.search(
        f"it stays, and the new weights are in .*worse/{name}", capsys.readouterr().err
    )
    assert (out / "worse" / f"{name}.safetensors").read_bytes() == poor


@pytest.mark.parametrize("writer", TRAINERS)
def test_what_lies_in_the_place_of_weights_is_looked_at_before_the_work(
    writer, tmp_path, monkeypatch, twenty_digits, capsys
):
    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("diffoc.training.trainer.train", work)
    monkeypatch.setattr("diffoc.training.mixtures.fit_mixture", work)
    name, command = TRAINERS[writer]
    file = tmp_path / f"{name}.safetensors"
    command = [*(word.replace("OUT", str(tmp_path)) for word in command), "--out", str(tmp_path)]
    for wrong in (b"half a file", save({"means": torch.zeros(2, 3)})):
        file.write_bytes(wrong)
        assert main(command) == 2
        assert re.search(rf"diffoc: path .*{name}\.safetensors", capsys.readouterr().err)
        assert file.read_bytes() == wrong
