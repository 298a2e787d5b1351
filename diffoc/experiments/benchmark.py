r"""What the controller costs: time and memory against the bare network's, and Table 1's price.

With F one evaluation of the denoiser and B one vector-Jacobian product, an iteration over T steps
with rank k should take :math:`T (F + (1 + k) B)`, or :math:`T (2 F + (1 + k) B)` where activations
are recomputed. The bare network does just that in a loop, without a controller; the two run in
turns, and the fastest of each count, so that other work on the machine does not decide.
"""

import itertools
import math
import platform
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from azula.denoise import Denoiser
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffoc.costs import GaussianLikelihood
from diffoc.lowrank import MatrixFree
from diffoc.priors.pretrained import load_prior, untrained_adm
from diffoc.problems.operators import average_pool
from diffoc.process import ReverseProcess
from diffoc.rules import Adam
from diffoc.solve import solve

TABLE_1_IMAGES = 5 * 1000
TABLE_1_NFE = (2500, 1000)
"""The paper's Table 1 has five tasks of 1000 images; an NFE is one step of one iteration."""


def bare_iteration(process: ReverseProcess, x: Tensor, rank: int, keep_activations: bool) -> None:
    """Makes an iteration's evaluations and products by the denoiser alone, at states x."""
    for t in process.times[:-1].to(x):
        if not keep_activations:
            with torch.no_grad():
                process.denoiser(x, t)
        at = x.detach().requires_grad_()
        with torch.enable_grad():  # the controller's callbacks have it disabled
            y = process.denoiser(at, t).mean
        for left in reversed(range(1 + rank)):
            torch.autograd.grad(y, at, torch.ones_like(y), retain_graph=left > 0)


def measure(
    prior: Denoiser, x: Tensor, steps: int, rank: int, keep_activations: bool, repeats: int
) -> dict[str, Any]:
    """Times iterations of the controller and of the bare network in turns, and takes the memory.

    The problem is to double the resolution, with Adam, T steps and rank k, from states x at time 1,
    (B, C, H, W) with even sides. Returned are, beside the setting, "evaluations" and "products" of
    one image; "seconds" and "bytes" of the controller, and "bare_seconds" and "bare_bytes" of the
    network; the "ratio" of the times; and by how much the memories differ in units of T n numbers
    of float32, "beyond". They are peaks without the weights; the network's has the activations of
    all steps if they are kept, else of one.
    """
    process = ReverseProcess(prior, steps)
    operator = average_pool(2)
    likelihood = GaussianLikelihood(operator, torch.zeros_like(operator(x)), 0.05)
    kept = MatrixFree(keep_activations)
    options: dict[str, Any] = {"rank": rank, "rule": Adam(), "derivatives": kept}
    bare: list[float] = []
    controlled: list[float] = []
    resumed: list[float] = []

    def between(iteration: int, costs: Tensor, x0: Tensor) -> None:
        now = clock(x.device)
        if resumed:  # the first iteration warms up
            controlled.append(now - resumed.pop())
        start = clock(x.device)
        bare_iteration(process, x, rank, keep_activations)
        resumed.append(clock(x.device))
        bare.append(resumed[0] - start)

    result = solve(process, likelihood, x, iterations=repeats + 1, callback=between, **options)
    least = _network_bytes(process, x, keep_activations)
    most, _ = peak_memory(lambda: solve(process, likelihood, x, iterations=2, **options), x.device)
    return {
        "shape": tuple(x.shape),
        "steps": steps,
        "rank": rank,
        "keep_activations": keep_activations,
        "evaluations": (int(result.evaluations[0]) - steps) // (repeats + 1),
        "products": int(result.products[0]) // (repeats + 1),
        "bare_seconds": min(bare),
        "seconds": min(controlled),
        "bare_bytes": least,
        "bytes": most,
        "ratio": min(controlled) / min(bare),
        "beyond": (most - least) / (4 * steps * x.numel()),
    }


def _network_bytes(process: ReverseProcess, x: Tensor, keep_activations: bool) -> int:
    first = ReverseProcess(process.denoiser, process.times[[0, -1]])
    one, _ = peak_memory(lambda: bare_iteration(first, x, 0, True), x.device)
    if not keep_activations:
        return one
    t = process.times[0].to(x)
    _, kept = peak_memory(lambda: process.denoiser(x.detach().requires_grad_(), t).mean, x.device)
    return one + (process.horizon - 1) * kept


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is active that are still alive.

    Activations that autograd keeps count, what a kernel allocates for itself does not. It works on
    every device. `live` and `peak` are the bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in before | self._alive:
                self._alive.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]


def peak_memory(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Returns the most bytes in use during `run`, and those that its result keeps beyond.

    On a CUDA device as its allocator counts them, elsewhere those of :class:`LiveTensors`.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        most = torch.cuda.max_memory_allocated(device) - before
        after = torch.cuda.memory_allocated(device) - before
    else:
        with LiveTensors() as tensors:
            result = run()
        most, after = tensors.peak, tensors.live
    del result  # was alive until here
    return most, after


def clock(device: torch.device | str) -> float:
    """Returns seconds, once a device has done what it was asked for; differences count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flop(prior: Denoiser, shape: Sequence[int]) -> tuple[int, int]:
    """Returns FLOP of F and of B for states (B, C, H, W), counted on tensors without memory.

    The prior is an azula denoiser on the "meta" device. A multiplication and an addition are two;
    only matrix products and convolutions count.
    """
    x = torch.empty(*shape, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = prior(x, torch.empty((), device="meta")).mean
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, x, torch.empty_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


def project(
    forward: float, product: float, ranks: Sequence[int], teraflops: float
) -> list[dict[str, Any]]:
    """Projects Table 1's cost on a device that sustains so many `teraflops`.

    `forward` and `product` are FLOP of F and of B; NFE, T times the iterations, takes the place of
    T, see the module. For each of the ranks k activations are kept and recomputed: "seconds" are
    those of an image, "gpu_hours" those of all.
    """
    rows = []
    for rank, keep, nfe in itertools.product(ranks, (True, False), TABLE_1_NFE):
        each = (1 if keep else 2) * forward + (1 + rank) * product
        seconds = nfe * each / (teraflops * 1e12)
        row = {"rank": rank, "keep_activations": keep, "nfe": nfe, "seconds": seconds}
        rows.append(row | {"gpu_hours": seconds * TABLE_1_IMAGES / 3600})
    return rows


def run(
    names: Sequence[str],
    *,
    steps: int,
    ranks: Sequence[int],
    batch: int,
    repeats: int,
    device: str,
    teraflops: float,
    random_weights: bool,
) -> dict:
    """Measures priors, projects Table 1, prints both, and returns them as numbers for JSON.

    Names are those of priors, see :func:`diffoc.load_prior`; with random weights "ffhq256" and
    "imagenet256" need no files. A batch at once is compared with as many images one after
    another, unless it is of 1. Other arguments are those of :func:`measure` and :func:`project`.
    """
    load = untrained_adm if random_weights else load_prior
    priors = {name: load(name).to(device) for name in names}
    for name, prior in priors.items():
        if max(ranks) > (size := math.prod(prior.image_shape)):
            raise ValueError(f"ranks has {max(ranks)}, expected at most {size} for {name}")
    with torch.device("meta"):
        network = untrained_adm("ffhq256")
    table = project(*flop(network, (1, *network.image_shape)), ranks, teraflops)
    on_cuda = torch.device(device).type == "cuda"
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "memory": "allocated" if on_cuda else "live tensors",
        "priors": {},
        "projected": {"teraflops": teraflops, "table_1": table},
    }
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    print(f"seconds of an iteration with T = {steps}; MB beyond the weights ({report['memory']})")
    print(
        f"{'prior':<12} B rank activations  F/step B/step  bare s  diffoc s  ratio  "
        "bare MB  diffoc MB  more / (T n)"
    )
    for name, prior in priors.items():
        rows = []
        for images, keep in ((1, True), (1, False), *([(batch, True)] if batch > 1 else [])):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(images, *prior.image_shape, generator=generator).to(device)
            for rank in ranks:
                rows.append(row := measure(prior, x, steps, rank, keep, repeats))
                print(
                    f"{name:<12} {images} {rank:>4} {_kept(row):<11} "
                    f"{row['evaluations'] / steps:>7g} {row['products'] / steps:>6g} "
                    f"{row['bare_seconds']:>7.3f} {row['seconds']:>9.3f} {row['ratio']:>6.3f} "
                    f"{row['bare_bytes'] / 1e6:>8.1f} {row['bytes'] / 1e6:>10.1f} "
                    f"{row['beyond']:>13.1f}",
                    flush=True,
                )
        for one, many in zip(rows, rows[2 * len(ranks) :], strict=False):
            print(
                f"{name}, rank {one['rank']}: {batch} images at once {many['seconds']:.3f} s, one "
                f"after another {batch * one['seconds']:.3f} s"
            )
        report["priors"][name] = rows
    print("\nPROJECTED from the FLOP of ffhq256, not measured: Table 1 on a device that sustains")
    print(f"{teraflops:g} TFLOP/s, which is an assumption")
    for line in table:
        print(
            f"NFE {line['nfe']}, rank {line['rank']}, activations {_kept(line)}: "
            f"{line['seconds']:.1f} s an image, {line['gpu_hours']:.0f} GPU-hours for "
            f"{TABLE_1_IMAGES} images"
        )
    return report


def _kept(row: dict[str, Any]) -> str:
    return "kept" if row["keep_activations"] else "recomputed"
