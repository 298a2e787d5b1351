"""Runs notebooks and tests under other instruction sets, thread counts and jitters.

    python tools/portable.py                         # everything that was not run yet: hours
    python tools/portable.py --only 12_ --settings default jitter1
    python tools/portable.py --report                # docs/portability.md from what was run

A setting is run at a time, a file at a time, in a process of its own; what a file gave is kept in
build/portable/SETTING/FILE and not run again until that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "portable"
FLAG = {"default": "", "avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16"}
"""What a CPU has to have for an instruction set, as Linux names it."""

INSTRUCTIONS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    **INSTRUCTIONS,
    "two threads": {"OMP_NUM_THREADS": "2"},
    **{f"jitter{seed}": {"PORTABLE_JITTER": str(seed)} for seed in (1, 2, 3)},
}
MARGIN = 3
"""How many spreads a bound has to be away."""

TESTS = (
    "test_ablations",
    "test_baselines_beyond",
    "test_certificates",
    "test_class_guidance",
    "test_experiments",
    "test_full_size",
    "test_greedy",
    "test_image_by_image",
    "test_inaccurate",
    "test_latent",
    "test_latent_baselines",
    "test_operator_per_image",
    "test_pixel_baselines",
    "test_recipes",
    "test_released",
    "test_solve_command",
    "test_shipped_priors",
    "test_solve",
    "test_states",
    "test_training",
)
"""Those whose computations in float32 go through many steps."""


def main() -> int:
    """Runs what is asked for and missing, and writes the report; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="files that begin so: 12_ test_sol")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    files = [*sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))]
    files += sorted(path for path in (ROOT / "tests").rglob("test_*.py") if path.stem in TESTS)
    chosen = [file for file in files if file.name.startswith(tuple(args.only))]
    settings = [name for name in args.settings or SETTINGS if can_run(name)]
    for name in set(args.settings or SETTINGS) - set(settings):
        print(f"{name}: this CPU does not have the instructions, so that is left out")
    todo = [
        (setting, file)
        for setting in settings
        for file in chosen
        if not (BUILD / setting / f"{key(file)}.xml").exists()
    ]
    for number, (setting, file) in enumerate([] if args.report else todo, 1):
        print(f"[{number}/{len(todo)}] {setting}: {file.name} ... ", end="", flush=True)
        start = time.perf_counter()
        run(setting, file)
        failed = [name for name, text in outcomes(setting, file).items() if text is not None]
        print(f"{time.perf_counter() - start:.0f} s" + "".join(f"\n    {f}" for f in failed))
    return report(files)


def key(file: Path) -> str:
    """The name of what is kept of a file, such as notebooks-00_quickstart.ipynb."""
    return "-".join(file.relative_to(ROOT).parts)


def can_run(setting: str) -> bool:
    """Whether this CPU has the setting's instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not FLAG.get(setting) or FLAG[setting] in known


def run(setting: str, file: Path) -> None:
    """Runs a file of tests or a notebook under a setting, and keeps what it reports."""
    place = BUILD / setting
    place.mkdir(parents=True, exist_ok=True)
    log = place / f"{key(file)}.log"
    log.unlink(missing_ok=True)
    startup = BUILD / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-portability.py").write_text(
        "import portability\nportability.start_kernel(get_ipython())\ndel portability\n"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)]),
        # The assertions of tests are compiled otherwise here.
        "PYTHONPYCACHEPREFIX": str(BUILD / "pycache"),
        "IPYTHONDIR": str(BUILD / "ipython"),
        "DIFFOC_FIGURES": str(BUILD / "figures"),
        "PORTABLE_LOG": str(log),
        **SETTINGS[setting],
    }
    part = place / f"{key(file)}.part"
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "portability", "-p", "no:xdist"]
    command += ["--override-ini", "enable_assertion_pass_hook=true", f"--junitxml={part}"]
    command += ["--nbval-lax", "--nbval-current-env", str(file)]
    output = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    (place / f"{key(file)}.txt").write_bytes(output.stdout)
    if not part.exists():
        raise RuntimeError(output.stdout.decode())
    part.rename(place / f"{key(file)}.xml")


def outcomes(setting: str, file: Path) -> dict[str, str | None]:
    """What became of every cell or test of a file: the message of its failure, or None."""
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(BUILD / setting / f"{key(file)}.xml").iter("testcase"):
        bad = [*case.iter("failure"), *case.iter("error")]
        text = (bad[0].get("message") or "") + "\n" + (bad[0].text or "") if bad else None
        found[case.get("name", "")] = text
    return found


def bounds(file: Path, settings: list[str]) -> list[tuple[float, str, float, float, float]]:
    """How far every bound of a file is, in spreads: (ratio, text, least, most, bound).

    A comparison is followed through the settings by its text and its number among those of that
    text; its distance is that from the side that is bounded to the bound.
    """
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for setting in settings:
        log = BUILD / setting / f"{key(file)}.log"
        counted: dict[str, int] = defaultdict(int)
        for line in log.read_text().splitlines() if log.exists() else []:
            place, operator, left, right = json.loads(line)
            text = f"{place} [{operator}]"
            sides = (left, right) if operator[0] == "<" else (right, left)
            found[text, counted[text]].append(sides)
            counted[text] += 1
    rows = []
    for (place, _), pairs in found.items():
        gaps = [high - low for low, high in pairs]
        spread = max(gaps) - min(gaps)
        if len(gaps) > 1 and spread > 0:
            ratio = sum(gaps) / len(gaps) / spread
            rows.append((ratio, place, min(gaps), max(gaps), spread))
    return sorted(rows)


def report(files: list[Path]) -> int:
    """Writes docs/portability.md of everything that was run; 1 if anything failed."""
    settings = [name for name in SETTINGS if (BUILD / name).is_dir()]
    lines = [f"| | {' | '.join(settings)} |", f"|---|{'---|' * len(settings)}"]
    failures, close, places = [], [], set()
    for file in files:
        shown, cells, done = file.relative_to(ROOT), [], []
        for setting in settings:
            if not (BUILD / setting / f"{key(file)}.xml").exists():
                cells.append("not run")
                continue
            done.append(setting)
            found = outcomes(setting, file)
            bad = {name: text for name, text in found.items() if text is not None}
            cells.append(f"**{len(bad)} of {len(found)} fail**" if bad else f"{len(found)} pass")
            for name, text in bad.items():
                places.add((file, name))
                # The lines that pytest and IPython mark, without IPython's colours.
                plain = re.sub(r"(#x1B|\x1b)\[[\d;]*m", "", text).splitlines()
                marked = [line for line in plain if re.match(r"E  |>  |-+> \d", line)]
                reason = " ".join(marked[:2] or plain[:1])
                failures.append(f"| {shown} | {name} | {setting} | {_cell(reason)} |")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
        for ratio, place, least, most, spread in bounds(file, done):
            if ratio < MARGIN:
                close.append(
                    f"| {shown} | {_cell(place)} | {least:.3g} | {most:.3g} | {spread:.3g} | "
                    f"{ratio:.1f} |"
                )
    text = HEAD.format(cpu=cpu(), places=len(places)) + "\n".join(lines) + "\n"
    if failures:
        text += "\n## What failed\n\n| file | cell or test | setting | why |\n|---|---|---|---|\n"
        text += "\n".join(failures) + "\n"
    text += CLOSE.format(margin=MARGIN)
    text += "\n".join(close) + "\n" if close else "| none | | | | | |\n"
    path = ROOT / "docs" / "portability.md"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(places)} places fail somewhere, {len(close)} are close")
    return int(bool(failures))


HEAD = """# The same on every machine

`make portable` runs every notebook and the tests that iterate in float32 under other instruction
sets, with two threads, and with shipped weights and measurements multiplied by 1 + 1e-6 z, z from
N(0, 1). This is what it found on {cpu}: {places} cells and tests fail under some setting. By how
much rounding moves the tables is in the file `spread_faces64.csv` of the
[records](records.md).

"as it is" is the CPU's own instruction set. Every setting but "two threads" has one thread.

"""
CLOSE = """
## Bounds that are close

The distance from a bound to what is bounded, least and most over the settings. The last column is
their mean over their spread; below {margin} the place is listed. What a line search compares
(`after <= before`) holds by construction, and what a clock measured is no result.

| file | what is asserted | least | most | spread | mean / spread |
|---|---|---|---|---|---|
"""


def cpu() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cell(text: str) -> str:
    return "`" + " ".join(text.split())[:160].replace("|", "\\|").replace("`", "'") + "`"


if __name__ == "__main__":
    sys.exit(main())
