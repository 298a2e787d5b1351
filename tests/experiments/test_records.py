"""Tables on the disk: whatever is torn is left out, and nothing is lost or doubled."""

import logging
from dataclasses import replace

import pytest

from diffoc.experiments import records
from diffoc.experiments.records import COLUMNS, Cell, as_json, read, shard_path, writing

SETTINGS = as_json({"steps": 3, "guidance": 0.5})
CELL = Cell("none", "float32", "task, “quoted”", "method", 3, SETTINGS, 0, ("a.png", "ü b.png"))
OTHER = replace(CELL, seed=1)


def rows_of(cell, psnr=20.0, **columns):
    found = {"status": "ok"} | columns
    return [row | found | {"psnr": str(psnr + i)} for i, row in enumerate(cell.rows())]


def write(path, *cells):
    with writing(path) as writer:
        for rows in cells:
            writer.append(rows)


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
    with pytest.raises(ValueError, match="damaged: lines 2"):
        read(path)
    path.write_text("".join([*lines[:2], lines[2].replace(",", "", 1), *lines[3:]]))
    with pytest.raises(ValueError, match="damaged: line 3 has"):
        read(path)


def test_line_breaks_where_they_cannot_be_read_back_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match="line break"):
        write(path, rows_of(replace(CELL, images=("a\nb",))))
    assert read(path) == {}


def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "table.csv"
    with (
        writing(path),
        pytest.raises(ValueError, match="written by another process"),
        writing(path),
    ):
        pass


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


def test_cells_are_read_from_their_rows():
    assert records.Cell.of(CELL.rows()) == CELL
