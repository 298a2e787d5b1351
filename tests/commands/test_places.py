"""Where commands write is tried before the work, and names of files are not taken for others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors

from diffoc.commands.main import main, parser_of
from diffoc.data import images as data
from diffoc.data.pictures import write_picture
from diffoc.data.provenance import ROOT
from diffoc.priors import pipelines
from diffoc.priors.pretrained import load_prior

WRITTEN = ("out", "keep", "checkpoint")
"""Options that name what a command writes; all others that are paths are read."""

READ = ("notebooks", "init", "image", "measurement", "images", "records", "kept")

NEEDED = {
    "fit": ["mnist"],
    "train": ["mnist"],
    "evaluate": ["mnist"],
    "solve": ["PICTURE", "--task", "super_resolution", "--prior", "mnist"],
    "run": ["table1", "--methods", "released", "--nfe", "1000", "--tasks", "super_resolution"],
    "tune": ["dps", "--tasks", "super_resolution"],
    "digits": ["--samples", "2"],
    "figures": [],
    "benchmark": ["mnist"],
    "preflight": ["--random-weights", "--prior", "ffhq256/32/64"],
    "ffhq": ["table3", "--rehearse", "--prior", "ffhq256/32/64"],
    "measure": ["FOLDER", "--images", "FOLDER"],
}


def path_options():
    for command, parser in parser_of()._subparsers._group_actions[0].choices.items():
        for action in parser._actions:
            if action.type is Path:
                yield command, action


def test_every_path_is_known_to_be_read_or_written():
    found = {action.dest for _, action in path_options()}
    assert found == {*WRITTEN, *READ}
    assert {command for command, action in path_options() if action.dest in WRITTEN} == {*NEEDED}


READ_ONLY = Path("/proc/diffoc/written")
"""Where root cannot write either."""


@pytest.mark.parametrize(
    "where",
    [
        "below a file",
        "in its place",
        "a pipe",
        "a link to nothing",
        pytest.param(
            "read only", marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
        ),
    ],
)
@pytest.mark.parametrize(
    ("command", "option"),
    [(c, a.option_strings[0]) for c, a in path_options() if a.dest in WRITTEN],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    command, option, where, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_picture(data.digits()[0][0], folder / "a.png")
    (tmp_path / "file").write_text("a file")
    # What takes a file meets a folder, and what takes a folder a file.
    is_file = option == "--checkpoint" or (option == "--out" and command in CSV)
    taken = folder if is_file else tmp_path / "file"
    below = {"below a file": tmp_path / "file" / "below", "read only": READ_ONLY}
    below |= {"a pipe": tmp_path / "pipe", "a link to nothing": tmp_path / "link"}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    place = below.get(where, taken)

    def work(*args, **options):
        raise AssertionError("the work began")

    for name in ("Module.__call__", "functional.conv2d"):
        monkeypatch.setattr(f"torch.nn.{name}", work)
    monkeypatch.setattr("diffoc.training.mixtures.fit_mixture_prior", work)
    monkeypatch.setattr("diffoc.figures.paper.write_all", work)
    words = {"PICTURE": str(folder / "a.png"), "FOLDER": str(folder)}
    needed = [words.get(word, word) for word in NEEDED[command]]
    assert main([command, *needed, option, str(place)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert place.name in err or "file" in err or "/proc/diffoc" in err
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("command", ["table", "check"])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link to nothing", "another file"])
def test_what_is_no_table_is_said_not_read(command, kind, tmp_path, capsys):
    place = tmp_path / "place.csv"
    if kind == "a folder":
        place.mkdir()
    elif kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a link to nothing":
        place.symlink_to(tmp_path / "nothing")
    else:
        place.write_bytes(bytes(range(256)))
    assert main([command, str(place)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "place.csv" in err
    assert "remove" not in err  # which may be all that somebody has


@pytest.mark.parametrize(
    ("command", "action"),
    [pytest.param(c, a, id=f"{c} {a.dest}") for c, a in path_options() if c in NEEDED],
)
def test_an_empty_path_is_not_the_folder_one_is_in(command, action, capsys):
    """As `--out "$OUT"` gives it where OUT is not set."""
    words = ["FILE" if word == "FOLDER" else word for word in NEEDED[command]]
    if action.dest == "measurement":  # in place of the picture
        words = words[1:]
    if action.option_strings:
        words += [action.option_strings[0], ""]
    else:
        words[0] = ""
    assert main([command, *words]) == 2
    said = action.option_strings[0] if action.option_strings else f"after {command!r}"
    err = capsys.readouterr().err
    assert said in err
    assert "is empty" in err


def test_a_reconstruction_does_not_write_over_what_it_was_made_from(tmp_path, capsys):
    for name in ("measurement.png", "reconstruction.png"):
        write_picture(data.digits()[0][0], tmp_path / name)
        before = (tmp_path / name).read_bytes()
        for words in ([str(tmp_path / name)], ["--measurement", str(tmp_path / name)]):
            task = ["--task", "super_resolution", "--prior", "mnist", "--out", f"{tmp_path}/."]
            assert main(["solve", *words, *task]) == 2
            assert "would be written over" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before


def test_numbers_of_a_benchmark_take_no_other_file_s_place(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("records")
    assert main(["benchmark", "mnist", "--out", str(tmp_path / "table.csv")]) == 2
    assert "expected a name that ends in .json" in capsys.readouterr().err
    assert (tmp_path / "table.csv").read_text() == "records"


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "diffoc", "table", "data/records/table1_faces64.csv"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    run.stdout.close()  # long before there is a line
    assert run.stderr.read() == b""
    assert run.wait() == 141


CSV = ("run", "tune", "digits", "benchmark")
"""Commands whose `--out` is a file; but the last of them has JSON."""


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["local/weights", "weights.safetensors", "a/b/c.bin"])
def test_files_and_paths_are_no_names_on_the_hub(name, kind, tmp_path, monkeypatch):
    def ask(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(pipelines, "snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="name_or_path"):
        load_prior(Path(name))  # there is nothing
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=f"name_or_path is the file {name}"):
        load_prior(kind(name))


@pytest.mark.parametrize("name", [None, 3, b"mnist", ["mnist"]])
def test_a_name_of_another_type_is_refused(name):
    with pytest.raises(TypeError, match="name_or_path is"):
        load_prior(name)


HUB = [
    e
    for e in vars(hub_errors).values()
    if isinstance(e, type) and issubclass(e, Exception) and "CLI" not in e.__name__
]


@pytest.mark.parametrize("error", [*HUB, OSError, ConnectionError, RuntimeError, KeyError])
def test_whatever_the_hub_raises_is_one_error(error, monkeypatch):
    def fail(*args, **options):
        raise Exception.__new__(error, "no such thing")

    monkeypatch.setattr(pipelines, "snapshot_download", fail)
    with pytest.raises((FileNotFoundError, ValueError), match=r"owner/name"):
        load_prior("owner/name")


def test_a_copy_without_its_folder(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="where there is nothing"):
        load_prior(tmp_path)
    assert torch.is_grad_enabled()
