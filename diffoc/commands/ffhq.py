"""The subcommands of the paper's tables on FFHQ: preflight, ffhq, measure."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from diffoc import figures
from diffoc.commands.tables import fill
from diffoc.data.downloads import sha256_of
from diffoc.data.files import replacing, try_file, try_folder
from diffoc.data.pictures import picture_size, read_picture, write_picture
from diffoc.data.provenance import ROOT
from diffoc.experiments import ffhq as tables
from diffoc.experiments import measured
from diffoc.experiments import preflight as checks
from diffoc.experiments.cells import Computer, folder_of, keep_in
from diffoc.experiments.inaccurate import RANDOM, accurate_name, sizes_of
from diffoc.experiments.measured import Measured, pictures_in
from diffoc.experiments.protocol import FFHQ_PROTOCOLS
from diffoc.experiments.records import alone
from diffoc.experiments.runs import recorded
from diffoc.priors.pretrained import shape_of
from diffoc.problems import perceptual

FIGURE_IMAGES = 4


def measure(args: argparse.Namespace) -> int:
    """Measures every folder of pictures, prints the means, and writes the rows."""
    truth = pictures_in(args.images)
    out = args.out or args.kept.parent / f"{args.kept.name}-measured"
    try_file(out / "measured.csv")
    sets = {}
    for name, folder in measured.sets_in(args.kept).items():
        kept = {path.stem: path for path in pictures_in(folder).values() if path.parent == folder}
        part = _measured(kept, truth, out / name, args)
        if part is None:
            print(f"{name}: part {args.shard[0]} of {args.shard[1]} measured, others to come")
            continue
        sets[name] = part
        means = ", ".join(f"{key} {value:.4g}" for key, value in part.means().items())
        print(f"{name}: {len(part.rows)} images: {means}")
    if sets:
        _say_missing(sets.values())
        measured.write_rows(out / "measured.csv", sets)
        print(out / "measured.csv")
    return 0


def _measured(
    kept: dict[str, Path], truth: dict[str, Path], place: Path, args: argparse.Namespace
) -> Measured | None:
    """Returns a set's numbers, once all parts are measured, else None; parts are kept and read."""
    if lost := [name for name in kept if name not in truth]:
        raise ValueError(f"images has no original of {lost[0]}: expected one picture of that name")
    i, n = args.shard or (1, 1)
    digest = _digest([*kept.values(), *(truth[name] for name in kept)], args.filter)
    parts = [place / f"{digest}.shard-{k}-of-{n}.pt" for k in range(1, n + 1)]
    path = parts[i - 1]
    if not path.exists():
        mine = dict(list(kept.items())[i - 1 :: n])
        network, missing = None, {}
        try:
            network = perceptual.inception().to(args.device)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            missing["fid"] = str(error)
        part = measured.measure(
            mine, truth, network, device=args.device, batch=args.batch, resize=args.filter
        )
        part.missing |= missing
        measured.write_part(path, part)
    if not all(one.exists() for one in parts):
        return None
    whole = Measured()
    for one in parts:
        whole.merge(measured.read_part(one))
    return whole


def _digest(pictures: Iterable[Path], resize: str) -> str:
    """Returns a digest of what decides the result: pictures, originals, filter, metrics.

    It is the same wherever the folders are, so that parts of several machines find each other.
    """
    files = [(path.name, sha256_of(path)) for path in pictures]
    text = repr((files, resize, sorted(perceptual.missing_metrics())))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _say_missing(parts: Iterable[Measured]) -> None:
    missing: dict[str, str] = {}
    notes: set[str] = set()
    for part in parts:
        missing |= part.missing
        notes |= part.notes
    for name, why in missing.items():
        print(f"no {name}: {why}")
    _say_notes(notes)


def _say_notes(notes: Iterable[str]) -> None:
    for note in sorted(notes):
        print(f"note: some pictures: {note}")


def preflight(args: argparse.Namespace) -> int:
    """Prints what is there and what it costs; 1 if something would fail."""
    prior, paths = _prior(args), _chosen(args)
    folder, names = _prepare(args, prior, paths[:4])
    report = checks.preflight(prior, paths, folder, names, args.device, args.precision, args.tasks)
    count = len(report.refused)
    print(f"{count} things would fail" if count else "nothing found that would fail")
    return int(count > 0)


def ffhq(args: argparse.Namespace) -> int:
    """Computes what a table does not have, measures it, and prints it beside the paper's."""
    args.random_weights |= args.rehearse
    prior, out = _prior(args), _out(args)
    for name in ("records.csv", f"{args.table}.csv", f"{args.table}.md"):
        try_file(out / name)
    protocol = FFHQ_PROTOCOLS[args.protocol]
    tables.check_protocol(out / "records.csv", protocol)
    folder, names = _prepare(args, prior, _chosen(args))
    cells = tables.cells_by_line(
        args.table,
        prior,
        names,
        args.batch,
        args.precision,
        tasks=args.tasks,
        smallest=args.rehearse,
    )
    compute = Computer(folder, args.device, protocol)
    fill(list(cells), compute, out / "records.csv", args, keep_in(out / "kept"), args.table)
    known = recorded(out / "records.csv")
    failed: Counter[tuple[str, str]] = Counter()
    precisions: set[str] = set()
    unexpected = 0
    for cell, line in cells.items():
        for row in (known[one] for one in alone(cell) if one in known):
            precisions.add(row["precision"])
            if row["status"] == "failed":
                failed[line.label, cell.task] += 1
                unexpected += not line.may_fail
    if args.shard:
        print("a part: the same command without --shard measures when all parts are there")
    else:
        head = (
            f"Protocol: {protocol.name}\n\n"
            f"Images: the {'first' if args.first else 'last'} {len(names)} by name, larger ones "
            f"made smaller by the filter {args.filter}; masks, boxes and motion kernels drawn "
            f"from seed 0; networks in {' and '.join(sorted(precisions))}"
        )
        folders = {(line.label, cell.task): folder_of(cell) for cell, line in cells.items()}
        _compare(args, out, folder, names, folders, head, failed)
    if unexpected:
        print(f"{unexpected} rows failed: the same command with --retry-failed computes them again")
    return int(unexpected > 0)


def _compare(
    args: argparse.Namespace,
    out: Path,
    originals: Path,
    names: Sequence[str],
    folders: dict[tuple[str, str], str],
    head: str,
    failed: Mapping[tuple[str, str], int],
) -> None:
    """Measures what was kept, writes the table, and draws the first images."""
    truth = {Path(name).stem: originals / name for name in names}
    sets: dict[tuple[str, str], Measured] = {}
    args.batch = max(args.batch, 16)
    for key, folder in folders.items():
        if (out / "kept" / folder).is_dir():
            kept = {k: path for k, path in pictures_in(out / "kept" / folder).items() if k in truth}
            part = _measured(kept, truth, out / "measured" / folder, args)
            if part is not None:
                sets[key] = part
    _say_missing(sets.values())
    rows = {", ".join(key): part for key, part in sets.items()}
    measured.write_rows(out / f"{args.table}.csv", rows)
    means = {key: part.means() | {"images": len(part.rows)} for key, part in sets.items()}
    text = tables.beside_the_paper(args.table, means, head, failed)
    if args.rehearse:
        text = "A REHEARSAL: random weights, two steps. The numbers mean nothing.\n\n" + text
    path = out / f"{args.table}.md"
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path}")
    for task in dict.fromkeys(task for _, task in sets):
        shown = {key[0]: pictures_in(out / "kept" / folders[key]) for key in sets if key[1] == task}
        print(_draw({"original": truth} | shown, out / f"{args.table}-{task}.png"))


def _draw(sets: Mapping[str, dict[str, Path]], path: Path) -> Path:
    """Writes a sheet of the first images: a row with its label for every set, in their order."""
    first, *others = sets.values()
    names = [name for name in first if all(name in some for some in others)][:FIGURE_IMAGES]
    if not names:
        raise ValueError(f"{path} would be empty: no picture is in all of {len(sets)} sets")
    side, _ = picture_size(first[names[0]])
    pictures = [read_picture(s[name], (3, side, side))[0] for s in sets.values() for name in names]
    figures.write_sheet(torch.cat(pictures), path, columns=len(names), labels=list(sets))
    return path


def _prior(args: argparse.Namespace) -> str:
    return RANDOM * args.random_weights + args.prior


def _out(args: argparse.Namespace) -> Path:
    name = "rehearsal" if args.random_weights else "ffhq"
    return args.out or ROOT / "build" / (name + "-released" * (args.protocol == "released"))


def _chosen(args: argparse.Namespace) -> list[Path]:
    """Returns the pictures asked for; in a rehearsal without a folder some are generated."""
    if args.images is None:
        if not args.random_weights:
            raise ValueError("images is missing: name the folder of FFHQ's pictures")
        args.images = _generated(_out(args) / "generated")
    paths = list(pictures_in(args.images).values())
    count = args.first or args.last or (FIGURE_IMAGES if args.rehearse else 1000)
    return paths[:count] if args.first else paths[-count:]


def _generated(folder: Path) -> Path:
    """Makes four pictures of 256 pixels, smooth and in colour, in nobody's likeness."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    coarse = 2 * torch.rand(FIGURE_IMAGES, 3, 8, 8, generator=generator) - 1
    smooth = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")
    for i, image in enumerate(smooth):
        write_picture(image, folder / f"{i:05d}.png")
    return folder


def _prepare(args: argparse.Namespace, prior: str, paths: Sequence[Path]) -> tuple[Path, list[str]]:
    """Returns a folder of PNG files of the prior's size, made where missing, and their names."""
    side = _side(prior)
    where = hashlib.sha256(str(args.images.resolve()).encode()).hexdigest()[:8]
    folder = _out(args) / f"originals-{where}-{side}-{args.filter}"
    try_folder(folder)
    names = [f"{path.stem}.png" for path in paths]
    said: set[str] = set()
    for path, name in zip(paths, names, strict=True):
        if not (folder / name).exists():
            pixels, notes = measured.read_resized(path, side, args.filter)
            said.update(notes)
            with replacing(folder / name) as part:
                Image.fromarray(pixels.movedim(0, -1).numpy()).save(part)
    _say_notes(said)
    return folder, names


def _side(prior: str) -> int:
    """Returns the side of a prior's images in pixels; its weights need not be there."""
    name, _, side = sizes_of(accurate_name(prior))
    channels, _, own = shape_of(name)
    if channels != 3 or name.endswith("_latent"):
        raise ValueError(f"prior is {name!r}, expected one of images in colour, such as ffhq256")
    return side or own
