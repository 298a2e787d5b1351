"""Tables on the disk: whatever is torn is left out, and nothing is lost or doubled."""

import errno
import logging
import re
import sys
from dataclasses import replace

import pytest

from diffoc.data.files import csv_text
from diffoc.experiments.records import (
    COLUMNS,
    METRICS,
    REQUIRED,
    Cell,
    as_json,
    read,
    shard_path,
    writing,
)

SETTINGS = as_json({"steps": 3, "guidance": 0.5})
CELL = Cell("none", "float32", "task, “quoted”", "method", 3, SETTINGS, 0, ("a.png", "ü b.png"))
OTHER = replace(CELL, seed=1)


def rows_of(cell, psnr=20.0, **columns):
    found = {"status": "ok"} | dict.fromkeys(REQUIRED, "0.5") | columns
    return [row | found | {"psnr": str(psnr + i)} for i, row in enumerate(cell.rows())]


def write(path, *cells):
    with writing(path) as append:
        for rows in cells:
            append(rows)


def test_a_table_whose_first_cell_raises_leaves_no_file(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(OSError, match="the memory"), writing(path):
        raise OSError("the memory is full")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write(path, rows_of(CELL), rows_of(OTHER, error="two\nlines,  \r\nand 'more'"))
    found = read(path)
    assert list(found) == [CELL, OTHER]
    assert [row["image"] for row in found[CELL]] == ["a.png", "ü b.png"]
    assert [row["psnr"] for row in found[CELL]] == ["20.0", "21.0"]
    assert found[OTHER][0]["error"] == "two lines, and 'more'"
    assert CELL.keywords == {"steps": 3, "guidance": 0.5}
    assert all(tuple(row) == COLUMNS for row in found[CELL])


def test_a_file_cut_anywhere_in_its_last_cell_loses_that_cell_only(tmp_path, caplog):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL))
    first = path.read_bytes()
    write(path, rows_of(OTHER))
    whole = path.read_bytes()
    assert whole.startswith(first)
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert list(read(path)) == [CELL]
        assert path.read_bytes() == whole[:size], "to read changes nothing"
        assert (f"{size - len(first)} bytes" in caplog.text) == (size > len(first))
        write(path, rows_of(OTHER))
        assert path.read_bytes() == whole
    torn = sorted(tmp_path.glob("table.csv.torn-*"), key=lambda file: len(file.read_bytes()))
    assert [file.read_bytes() for file in torn] == [
        whole[len(first) : size] for size in range(len(first) + 1, len(whole))
    ]


def test_a_file_cut_anywhere_in_its_first_cell_begins_anew(tmp_path):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL))
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        assert read(path) == {}
        write(path, rows_of(CELL))
        assert path.read_bytes() == whole


def test_other_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "table.csv"
    for content in ("a,b\n1,2\n", "a,b", "prior,precision\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="no table of this version"):
            read(path)
        with pytest.raises(ValueError, match="no table of this version"), writing(path):
            pass
        assert path.read_text() == content
    with pytest.raises(FileNotFoundError, match="missing"):
        read(tmp_path / "other.csv")


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL), rows_of(OTHER))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))  # a row of the first cell is missing
    with pytest.raises(ValueError, match="damaged: line 3: seed is '1', but '0'"):
        read(path)
    path.write_text("".join([*lines[:2], lines[2].replace(",", "", 1), *lines[3:]]))
    with pytest.raises(ValueError, match="damaged: line 3: it has"):
        read(path)


def test_line_breaks_where_they_cannot_be_read_back_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match="line break"):
        write(path, rows_of(replace(CELL, images=("a\nb",))))
    assert not path.exists()


FAILED = [row | {"status": "failed", "error": "no"} for row in replace(CELL, seed=2).rows()]


def damaged(path, content):
    """Whether both doors refuse a file in one line that names it, and leave all as it is."""
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert str(path) in message
        assert "\n" not in message
        with pytest.raises(ValueError, match=re.escape(message)), writing(path):
            pass
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]
        return True
    with writing(path):
        pass
    for torn in path.parent.glob("*.torn-*"):
        assert (path.read_bytes() if path.exists() else b"") + torn.read_bytes() == content
        torn.unlink()
    return False


def test_one_wrong_character_is_refused_or_harms_its_own_cell_only(tmp_path):
    """Each character is deleted, and each digit is changed, of a file of three cells."""
    path = tmp_path / "table.csv"
    one = replace(CELL, images=("c",), seed=3)
    write(path, rows_of(CELL, seconds="1.5"), rows_of(one), FAILED)
    content, cells = path.read_bytes(), read(path)
    ends = [content.index(b"\n") + 1]
    for rows in cells.values():
        end = ends[-1]
        for _ in rows:
            end = content.index(b"\n", end) + 1
        ends.append(end)
    refused = 0
    for place in range(len(content)):
        old = content[place : place + 1]
        others = [b"", *(b"%d" % ((int(old) + k) % 10) for k in (1, 5) if old.isdigit())]
        owner = next((cell for cell, end in zip(cells, ends[1:], strict=True) if place < end), None)
        for new in others:
            if damaged(path, content[:place] + new + content[place + 1 :]):
                refused += 1
                continue
            assert place >= ends[0], "the header"
            found = read(path)
            rest = {cell: rows for cell, rows in cells.items() if cell != owner}
            assert rest.items() <= found.items()
            assert len(found) <= len(cells)
    assert refused > len(content) / 2


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("batch", value) for value in ("88", "22", "0", "-2", "2.0", "")),
        *(("nfe", value) for value in ("33", "x", "")),
        *(("seed", value) for value in ("7", "")),
        *(("settings", value) for value in ("", "{}", "[]", '{"steps":3}')),
        *(("status", value) for value in ("", "OK", "fine", "failed", "unsupported")),
        *((key, value) for key in METRICS for value in ("nan", "inf", "high")),
        *((key, "") for key in REQUIRED),
        *(("lpips_vgg", value) for value in ("0.5",)),
        *((key, value) for key in ("evaluations", "seconds") for value in ("nan", "7")),
        *((key, "") for key in ("image", "prior", "precision", "task", "method")),
        ("image", "ü b.png"),
        *((key, "another") for key in ("weights_sha256", "protocol", "commit")),
        *((key, "another") for key in ("versions", "device", "threads", "error")),
    ],
)
def test_a_wrong_value_in_any_column_is_refused(tmp_path, column, value, last):
    path = tmp_path / "table.csv"
    rows = rows_of(CELL)
    write(path, rows)
    other = path.read_bytes()
    lines = other.splitlines(keepends=True)
    values = dict.fromkeys(COLUMNS, "") | rows[0] | {column: value}
    changed = lines[0] + csv_text(COLUMNS, [values]).encode() + lines[2]
    write(path, FAILED)
    assert damaged(path, changed if last else changed + path.read_bytes()[len(other) :])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_is_left_at_the_end_has_to_be_the_beginning_of_one_cell(tmp_path, cut):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL), rows_of(OTHER))
    lines = path.read_bytes().splitlines(keepends=True)
    two = {1: lines[:2] + lines[3:4], 2: [*lines[:2], lines[3][:-9]], 3: [*lines[:4], b"a,b,c"]}
    assert damaged(path, b"".join(two[cut]))


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL))
    before = path.read_bytes()
    for rows in (rows_of(OTHER)[:1], rows_of(OTHER, ssim="nan"), rows_of(OTHER, status="done"), []):
        with pytest.raises(ValueError, match=r"damaged|expected those of one whole cell"):
            write(path, rows)
        assert path.read_bytes() == before


def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "table.csv"
    with (
        writing(path),
        pytest.raises(ValueError, match="written by another process"),
        writing(path),
    ):
        pass


def test_where_files_cannot_be_locked_tables_are_read_and_not_written(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write(path, rows_of(CELL))
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert list(read(path)) == [CELL]
    with pytest.raises(OSError, match=r"table.csv cannot be locked: write it on Linux or macOS"):
        write(path, rows_of(OTHER))
    assert list(read(path)) == [CELL]


def test_file_systems_without_locks_are_named_with_the_way_round(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"table.csv cannot be locked .*local disk.* --out"):
        write(tmp_path / "table.csv", rows_of(CELL))


def test_shards_are_read_together(tmp_path):
    path = tmp_path / "table.csv"
    shards = [shard_path(path, (i, 2)) for i in (1, 2)]
    assert [shard.name for shard in shards] == ["table.shard-1-of-2.csv", "table.shard-2-of-2.csv"]
    write(shards[0], rows_of(CELL, seconds="1"))
    write(shards[1], rows_of(OTHER))
    assert list(read(path)) == [CELL, OTHER]
    write(path, rows_of(CELL, seconds="2"))  # the same result again, but for its time
    assert len(read(path)) == 2
    write(shards[1], rows_of(CELL, psnr=20.5))
    with pytest.raises(ValueError, match=r"shard-2-of-2.* has other results"):
        read(path)
    for wrong in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="shard is"):
            shard_path(path, wrong)


def test_success_replaces_failure_and_not_the_other_way_round(tmp_path):
    path = tmp_path / "table.csv"
    failed = [row | {"status": "failed", "error": "no"} for row in CELL.rows()]
    write(path, failed)
    assert read(path)[CELL][0]["status"] == "failed"
    write(path, rows_of(CELL))
    assert read(path)[CELL][0]["status"] == "ok"
    write(path, failed)
    assert read(path)[CELL][0]["status"] == "ok"
