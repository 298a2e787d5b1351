"""Grids that are killed, sharded, spread over workers, and checked; with a method of no cost."""

import importlib.util
import math
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_cells import CELLS, fake, in_workers, sleeping, without_b
from PIL import Image

from diffoc.data.provenance import device_name
from diffoc.experiments import runs, spread
from diffoc.experiments.cells import check_settings, time_prior
from diffoc.experiments.measured import measure
from diffoc.experiments.methods import METHODS
from diffoc.experiments.records import (
    ENVIRONMENT,
    METRICS,
    by_image,
    in_batches,
    read,
    rows_of,
    shard_path,
    writing,
)
from diffoc.experiments.runs import (
    MethodError,
    check,
    method_errors,
    run_cells,
    unfinished,
)
from diffoc.problems.tasks import TASKS, UnsupportedTask
from diffoc.riccati import SingularControlHessianError

NUMBERS = dict.fromkeys(METRICS, "1")


def run(path, compute=fake, cells=CELLS, **options):
    return run_cells(cells, compute, path, progress=False, **options)


def results(path):
    return {
        cell: [[row["status"], *(row[key] for key in METRICS)] for row in rows]
        for cell, rows in read(path).items()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "table.csv"
    assert run(path) == {"ok": 11, "failed": 0, "unsupported": 1}
    found = results(path)
    assert list(found) == CELLS
    assert found[CELLS[9]] == [["unsupported"] + [""] * len(METRICS)]
    assert float(found[CELLS[1]][1][1]) == pytest.approx(1 + 4 / 7)
    return found


def test_what_is_there_is_not_computed_again(tmp_path, expected):
    calls = []

    def counted(cell):
        calls.append(cell)
        return fake(cell)

    path = tmp_path / "table.csv"
    assert unfinished(CELLS, path) == CELLS
    run(path, counted, CELLS[:5])
    before = path.read_bytes()
    assert unfinished(CELLS, path) == CELLS[5:]
    run(path, counted)
    run(path, counted)
    assert calls == CELLS
    assert path.read_bytes().startswith(before)
    assert results(path) == expected


def test_another_batch_computes_only_what_no_batch_had(tmp_path):
    """A day that began with four images at once goes on with two, and what failed may be again."""
    path, seen = tmp_path / "table.csv", []

    def counted(cell):
        seen.extend(cell.images)
        if "b" in cell.images and len(seen) < 5:
            with method_errors():
                raise RuntimeError("it broke")
        return [dict.fromkeys(METRICS, "1")] * len(cell.images), None

    def cells(names, batch):
        return [replace(CELLS[0], images=some) for some in in_batches(names, batch)]

    assert run(path, counted, cells("abcd", 2)) == {"ok": 1, "failed": 1, "unsupported": 0}
    assert run(path, counted, cells("abcdef", 3)) == {"ok": 1, "failed": 1, "unsupported": 0}
    assert "".join(seen) == "ab" + "ab" + "cdef"  # those of the batch that failed, each alone
    assert unfinished(cells("abcdef", 1), path) == []
    assert [c.images for c in unfinished(cells("abcdef", 4), path, None, True)] == [("b",)]
    assert run(path, counted, cells("abcdef", 1), retry_failed=True)["ok"] == 6
    assert "".join(seen) == "ababcdefb"
    assert all(row["status"] == "ok" for row in by_image(read(path)).values())
    assert "".join(sorted(one.images[0] for one in by_image(read(path)))) == "abcdef"


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_no_method_takes_is_no_record(method):
    """It ends the run, before the first cell where the method looks at it before it begins."""
    nfe = {"paper": 1000, "paper_tuned": 1000, "released": 1000}.get(method, 300)
    good = METHODS[method].settings("super_resolution", nfe)
    good |= METHODS[method].trials(nfe)[0] if METHODS[method].tuned else {}
    check_settings(method, good)
    for key, value in good.items():
        wrongs = ["maybe", 1.5] if isinstance(value, bool | int) else ["maybe", math.nan, True]
        wrongs += [10**9] * ("steps" in key)  # no list of that length is made
        for wrong in wrongs:
            with pytest.raises(ValueError, match=rf"^settings of {method}.*{SAID.get(key, key)}"):
                check_settings(method, good | {key: wrong})
        with pytest.raises(ValueError, match="is nothing"), method_errors(good):
            raise ValueError(f"{key} is nothing")
    with pytest.raises(ValueError, match="settings has 'nothing'"):
        check_settings(method, good | {"nothing": 1})
    with pytest.raises(MethodError), method_errors(good):
        raise ValueError("it did not converge")


SAID = {"control_cost": "weight|control_cost", "weight_scale": "weight"}
"""What recipes call settings of the methods that put them in."""


def test_rows_of_a_batch_that_failed_are_replaced_image_by_image(tmp_path):
    path, bad = tmp_path / "table.csv", ["b", "d"]

    def brittle(cell):
        with method_errors():
            if some := [image for image in cell.images if image in bad]:
                raise RuntimeError(f"{some} broke")
        return [dict.fromkeys(METRICS, "1")] * len(cell.images), None

    def again(names, batch):
        cells = [replace(CELLS[0], images=some) for some in in_batches(names, batch)]
        found = run(path, brittle, cells, retry_failed=True)
        rows = rows_of(path)
        assert sum(found.values()) == len(cells)
        return found["failed"], dict(zip(rows["image"], rows["error"], strict=True)), len(rows)

    whole = "the batch broke"  # as it was recorded once
    failed = {"status": "failed", "error": whole}
    with writing(path) as append:
        append([row | failed for row in replace(CELLS[0], images=tuple("abcd")).rows()])
    alone = {name: repr(RuntimeError(f"['{name}'] broke")) for name in "bd"}
    # The first two are done again, of which one fails: the others' record is still the batch's.
    assert again("ab", 1) == (1, {"a": "", "b": alone["b"], "c": whole, "d": whole}, 4)
    assert again("abcd", 1) == (2, {"a": "", "b": alone["b"], "c": "", "d": alone["d"]}, 4)
    bad.remove("b")
    assert again("abcd", 2) == (1, dict.fromkeys("abc", "") | {"d": alone["d"]}, 4)
    bad.remove("d")
    assert again("abcd", 4) == (0, dict.fromkeys("abcd", ""), 4)
    assert read(path).keys() == {replace(CELLS[0], images=(name,)) for name in "abcd"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_image_that_fails_takes_no_other_of_its_batch_with_it(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    path, kept, cell = tmp_path / "table.csv", [], replace(CELLS[0], images=tuple("abc"))
    found = run(path, without_b, [cell], jobs=jobs, keep=lambda cell, _: kept.extend(cell.images))
    assert found == {"ok": 0, "failed": 1, "unsupported": 0}
    rows = {one.images[0]: row for one, row in by_image(read(path)).items()}
    for name in "ac":
        ((expected,), _) = fake(replace(cell, images=(name,)))
        assert rows[name]["psnr"] == expected["psnr"]
    assert [rows[name]["status"] for name in "abc"] == ["ok", "failed", "ok"]
    assert rows["b"]["error"] == "RuntimeError('b broke')"
    assert rows["b"]["versions"]
    assert rows["b"]["device"]
    assert {row["batch"] for row in rows.values()} == {"1"}
    assert kept == ["a", "c"]
    assert unfinished([cell], path) == []


def test_products_are_not_shortened(tmp_path):
    found = []

    def asked(cell):
        found.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        return fake(cell)

    torch.backends.cudnn.allow_tf32 = True
    run(tmp_path / "table.csv", asked, CELLS[:1])
    torch.backends.cudnn.allow_tf32 = True  # and where times are taken
    time_prior("mnist", 1, "float32", "cpu", repeats=1)
    asked(CELLS[0])
    torch.backends.cudnn.allow_tf32 = True  # and where images are measured
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    pictures = {"a": tmp_path / "a.png"}
    measure(pictures, pictures, lambda pixels: asked(CELLS[0]) and pixels.float().mean((2, 3)))
    assert found == [False] * 6


DEVICE = (
    *("CUDA error: an illegal memory access", "cuDNN error: CUDNN_STATUS_MAPPING_ERROR"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"),
    *("cuFFT error: CUFFT_INTERNAL_ERROR", "GET was unable to find an engine to execute this"),
    "NVML_SUCCESS == r INTERNAL ASSERT",
)
"""What torch says of a GPU and its libraries."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((kind("no"), MethodError) for kind in (ValueError, RuntimeError, ZeroDivisionError)),
        (SingularControlHessianError("no"), MethodError),
        (UnsupportedTask("no"), UnsupportedTask),
        *((MemoryError(), OSError), (torch.OutOfMemoryError("CUDA out of memory"), OSError)),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), OSError),
        *((RuntimeError(f"{said} failed"), OSError) for said in DEVICE),
        (torch.linalg.LinAlgError("cusolver error: the matrix may have NaN"), MethodError),
        *((kind("no"), kind) for kind in (OSError, FileNotFoundError, ImportError, KeyError)),
        *((kind("no"), kind) for kind in (TypeError, NotImplementedError, KeyboardInterrupt)),
    ],
)
def test_only_what_a_method_raises_is_a_record(tmp_path, error, kind):
    """What the machine, the data or the code raise ends the run, and the next one computes it."""

    def broken(cell):
        if cell.seed == 1:
            with method_errors():
                raise error
        return fake(cell)

    path = tmp_path / "table.csv"
    if kind in (MethodError, UnsupportedTask):
        run(path, broken, CELLS[:3])
        status = {MethodError: "failed", UnsupportedTask: "unsupported"}[kind]
        assert by_image(read(path))[replace(CELLS[1], images=("a",))]["status"] == status
    else:
        with pytest.raises(kind) as raised:
            run(path, broken, CELLS[:3])
        assert "\n" not in str(raised.value)
        assert list(read(path)) == CELLS[:1]
        assert unfinished(CELLS[:3], path) == CELLS[1:3]


def test_images_are_kept_before_their_rows_are_written(tmp_path):
    path, kept = tmp_path / "table.csv", {}

    def keep(cell, images):
        assert cell not in read(path)
        kept[cell] = images

    run(path, keep=keep)
    assert list(kept) == [*CELLS[:9], *CELLS[10:]]
    assert kept[CELLS[5]].flatten().tolist() == [5.0, 5.0, 5.0]


def slow(cell):
    time.sleep(0.3)
    return fake(cell)


# A fork has torch loaded already, which a new process waits for.
BEGIN = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def test_a_killed_process_goes_on_where_it_was(tmp_path, expected):
    path, known = tmp_path / "table.csv", 0
    for _ in range(3):
        process = BEGIN.Process(target=run, args=(path, slow))
        size = path.stat().st_size if path.exists() else 0
        process.start()
        while process.is_alive() and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.005)
        time.sleep(0.07)
        assert process.is_alive(), "it was to be killed while it works"
        process.kill()
        process.join()
        found = results(path)
        assert all(found[cell] == expected[cell] for cell in found)
        assert known < len(found) < len(CELLS)
        known = len(found)
    run(path)
    assert results(path) == expected
    assert len(path.read_text().splitlines()) == 1 + sum(len(cell.images) for cell in CELLS)


def with_workers(path):
    from joblib.externals.loky import reusable_executor

    # What a fork has of them are the parent's workers; a reference to them ends none.
    parents, reusable_executor._executor = reusable_executor._executor, None
    run(path, sleeping, jobs=2)
    del parents


def test_workers_end_with_the_run_that_started_them(tmp_path, monkeypatch):
    path, pids = tmp_path / "table.csv", tmp_path / "workers"
    pids.mkdir()
    monkeypatch.setenv("WORKERS", str(pids))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    process = BEGIN.Process(target=with_workers, args=(path,))
    process.start()
    while process.is_alive() and (not path.exists() or len(read(path)) < 2):
        time.sleep(0.05)
    process.terminate()
    process.join()
    workers = {int(file.name) for file in pids.iterdir()}
    assert workers
    for _ in range(400):
        workers = {pid for pid in workers if runs_still(pid)}
        if not workers:
            break
        time.sleep(0.05)
    assert not workers
    assert len(read(path)) == 2


def runs_still(pid):
    """Whether there is such a process, and it is more than the entry of a dead one."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc").is_dir()


def test_shards_make_the_table(tmp_path, expected):
    path = tmp_path / "table.csv"
    counts = [run(path, shard=(i, 3)) for i in (1, 2, 3)]
    assert [sum(count.values()) for count in counts] == [4, 4, 4]
    assert not path.exists()
    assert shard_path(path, (2, 3)).exists()
    assert results(path) == expected
    assert unfinished(CELLS, path) == []


def test_a_shard_beyond_the_last_cell_leaves_no_file(tmp_path):
    folder = tmp_path / "new"
    nothing = {"ok": 0, "failed": 0, "unsupported": 0}
    assert run(folder / "table.csv", cells=CELLS[:2], shard=(3, 3)) == nothing
    assert run(folder / "table.csv", cells=[]) == nothing
    assert not folder.exists()


@pytest.mark.parametrize(
    "backend",
    [
        "loky",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("ray") is None,
                reason="ray is not installed: pip install -e '.[cluster]'",
            ),
        ),
    ],
)
def test_two_workers_make_the_same_table(tmp_path, expected, backend, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    if backend == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        path = tmp_path / "table.csv"
        run(path, in_workers, jobs=2, backend=backend)
    finally:
        if backend == "ray":
            ray.shutdown()
    assert results(path) == expected
    rows = [row for cell in read(path).values() for row in cell if row["status"] == "ok"]
    assert str(os.getpid()) not in {row["error"].split()[0] for row in rows}
    assert {row["error"].split()[1] for row in rows} == {"1"}
    assert {row["threads"] for row in rows} == {"1"}
    if backend == "loky":  # each has a number of its own, by which it takes its card
        found = {row["error"] for row in rows}
        assert sorted(each.split()[2] for each in found) == ["0", "1"][: len(found)]
        assert len({each.split()[0] for each in found}) == len(found)


def test_a_worker_on_cuda_takes_the_card_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runs, "environment", lambda device: {})
    monkeypatch.setattr(runs, "_end_with", lambda parent: None)
    threads = torch.get_num_threads()
    for number in (0, 1, 2):
        monkeypatch.setattr(runs, "worker_number", lambda parent, n=number: n)
        runs._attempt(fake, CELLS[0], "cuda", parent=1)
        runs._attempt(fake, CELLS[0], "cuda:1", parent=1)  # which was asked for
    assert taken == [0, 1, 0]
    torch.set_num_threads(threads)


def test_ray_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[cluster\]'"):
        run(tmp_path / "table.csv", jobs=2, backend="ray")


def test_check_agrees_with_the_truth_and_finds_the_smallest_change(tmp_path):
    path = tmp_path / "table.csv"
    run(path, cells=CELLS[:6])
    rows = sum(len(cell.images) for cell in CELLS[:6])
    found = check(path, fake, rows=rows)
    assert (found.rows, found.exact, found.differences) == (rows, rows, [])

    def changed(cell):
        found, images = fake(cell)
        found[0]["ssim"] = f"{float(found[0]['ssim']) + 1e-7:.9g}"
        return found, images

    found = check(path, changed, rows=rows)
    assert len(found.differences) == 6
    assert all("ssim is" in line and "in the record" in line for line in found.differences)
    assert len(check(path, changed, rows=1).differences) == 1
    one = check(path, changed, rows=rows, only=lambda cell: cell == CELLS[2])
    assert (one.rows, len(one.differences)) == (len(CELLS[2].images), 1)


def test_check_tolerates_rounding_only_on_another_machine(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(runs, "environment", lambda device: {"device": "another"})
        run(path, cells=CELLS[:1])

    def off_by(amount):
        def compute(cell):
            found, images = fake(cell)
            return [row | {"psnr": str(float(row["psnr"]) + amount)} for row in found], images

        return compute

    near = check(path, off_by(0.2), rows=1)
    assert (near.exact, near.differences) == (0, [])
    assert near.tolerances == {("fake", "one", "float32"): 0.3}  # which was not measured
    assert "psnr" in check(path, off_by(-0.4), rows=1).differences[0]
    known = {("fake", "one", "float32"): {"psnr_face": 0.05, "ssim_face": 1e-9}}
    monkeypatch.setattr(spread, "measured", lambda: known)
    near = check(path, off_by(0.1), rows=1)
    assert near.tolerances == {("fake", "one", "float32"): pytest.approx(0.15)}
    assert near.differences == []
    assert "psnr" in check(path, off_by(0.2), rows=1).differences[0]


def test_a_gpu_is_not_held_to_the_last_digit(tmp_path, monkeypatch):
    """Its sums have no fixed order: the same card, versions and threads agree within the spread."""
    monkeypatch.setattr(runs, "environment", lambda device: dict.fromkeys(ENVIRONMENT, "x"))
    path, moved = tmp_path / "table.csv", lambda cell: ([NUMBERS | {"psnr": "1.0000001"}], None)
    run(path, lambda cell: ([NUMBERS], None), CELLS[:1])
    assert check(path, moved, device="cuda").differences == []
    assert check(path, moved, device="cuda").exact == 0
    assert check(path, moved, device="cpu").exact == 1
    assert len(check(path, moved, device="cpu").differences) == 1


def test_the_table_of_spreads_is_of_methods_and_tasks_that_there_are():
    found = spread.measured()
    assert {method for method, _, _ in found} <= set(METHODS)
    assert {task for _, task, _ in found} <= set(TASKS)
    for columns in found.values():
        assert 0 <= columns["psnr_mean"] <= columns["psnr_face"]
    # The page on portability names it.
    chaotic = {key[:2] for key, columns in found.items() if columns["psnr_face"] > 1}
    assert chaotic == {("cold", "random_inpainting")}


def test_a_machine_is_named_with_the_instructions_that_it_may_use(monkeypatch):
    name = device_name("cpu")
    device_name.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert device_name("cpu") == f"{name} SSE41"
    device_name.cache_clear()


def test_check_says_that_inputs_differ(tmp_path):
    path = tmp_path / "table.csv"
    run(path, lambda cell: ([NUMBERS | {"image_sha256": "a"}], None), CELLS[:1])
    other = check(path, lambda cell: ([NUMBERS | {"image_sha256": "b"}], None))
    assert other.differences == ["fake, one, image a: image_sha256 is b now, a in the record"]


def test_check_needs_something_to_check(tmp_path):
    path = tmp_path / "table.csv"
    run(path, cells=[CELLS[9]])
    with pytest.raises(ValueError, match="no row that could be checked"):
        check(path, fake)
    with pytest.raises(ValueError, match="rows is 0"):
        check(path, fake, rows=0)
    run(path, cells=CELLS[:1])
    with pytest.raises(ValueError, match="no row that could be checked"):
        check(path, fake, only=lambda cell: False)
