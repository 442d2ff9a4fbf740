"""The Triton kernels beside what they replace: their errors against float64, and their time.

python -m experiments.kernel_benchmark                           bfloat16, at the sizes of GPT-2 small, B = 32, T = 1024
python -m experiments.kernel_benchmark --dtype float32 --examples 8 --kernels linear

Baselines: of a Linear, torch's matmul for the gradient alone (cuBLAS); of its step, forward and backward, the plain
one; of normalisations and embeddings, torch's own backward pass; of an optimizer's step, torch's fused AdamW, which
reads no statistics. All ways to the same take turns, so that a
change of the device's speed meets them alike; a ratio is taken turn by turn. Needs a CUDA device, and says so without.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.machine import save
from experiments.benchmarks.turns import alternate, ratio
from gradstats.forms.outer import OuterSum
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import Moment

NAMES = ("sum_of_squares", "squared_norms")
BASELINE = "torch"
Way = Callable[[], Sequence[Tensor]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Of results that are rounded to the dtype; a sum of squares of contributions that are not has less.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
KERNELS = ("linear", "step", "normalization", "rows", "adam")

# Of GPT-2 small, o x i: attention's and the MLP's two projections each, and the head; the last one also with as many
# words as the device reads in whole vectors.
LINEAR = ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768), (50304, 768))
FEW_POSITIONS = (4, 16)
WIDTH, WORDS = 768, 50257
# Parameters of GPT-2 small, in as many tensors.
SIZES = (50257 * 768, 1024 * 768, *[size for o, i in LINEAR[:4] for size in (o * i, o)] * 12, *[768] * 50)


@dataclass(frozen=True)
class Case:
    """Ways to the same tensors, the baseline first, which may give fewer; and what they are in float64."""

    title: str
    ways: dict[str, Way]
    expected: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Measurement:
    """Milliseconds are a median; `ratio` to the baseline is the median over turns, between its quartiles. `errors` are
    ||a - b|| / ||b||, of a gradient and of sums."""

    kernel: str
    case: str
    dtype: str
    way: str
    errors: list[float]
    milliseconds: float
    lower: float
    ratio: float
    upper: float


def flat(way: Callable[[], tuple[Tensor, dict[str, Tensor]]]) -> list[Tensor]:
    """A gradient and sums."""
    gradient, sums = way()
    return [gradient, *(sums[name] for name in NAMES)]


def linear(n: int, t: int, o: int, i: int, dtype: torch.dtype, device: str) -> Case:
    from gradstats.kernels import linear

    d = torch.randn(n, t, o, device=device).to(dtype)
    a = torch.randn(n, t, i, device=device).to(dtype)
    form = OuterSum(d, a)

    def expected() -> list[Tensor]:
        gradient = torch.zeros(o, i, dtype=torch.float64, device=device)
        squares, norms = torch.zeros_like(gradient), []
        for n in range(len(d)):
            c = d[n].double().T @ a[n].double()
            gradient += c
            squares.addcmul_(c, c)
            norms.append(c.square().sum())
        return [gradient, squares, torch.stack(norms)]

    ways: dict[str, Way] = {BASELINE: lambda: [form.gradient()]}
    for name, way in linear.ways(d, a, NAMES).items():
        ways[name] = partial(flat, way)
    ways["an example after the other"] = partial(flat, partial(super(OuterSum, form).direct, NAMES))
    return Case(f"n {n}, t {t}, {o} x {i}", ways, expected)


def step(n: int, t: int, o: int, i: int, dtype: torch.dtype, device: str) -> Case:
    """The same within forward and backward of the layer, two matmuls more of the same size."""
    inner = linear(n, t, o, i, dtype, device)
    x, d = (torch.randn(n * t, size, device=device).to(dtype) for size in (i, o))
    weight = torch.randn(o, i, device=device).to(dtype)

    def within(way: Way) -> Way:
        def whole() -> Sequence[Tensor]:
            torch.mm(x, weight.T)
            torch.mm(d, weight)
            return way()

        return whole

    ways = {name: within(way) for name, way in inner.ways.items()}
    return Case(f"a layer's step, {inner.title}", ways, inner.expected)


def normalization(n: int, t: int, f: int, centered: bool, dtype: torch.dtype, device: str) -> Case:
    from gradstats.kernels import normalization

    x, d = (torch.randn(n, t, f, device=device).to(dtype) for _ in range(2))
    weight, eps = torch.rand(f, device=device).to(dtype), 1e-5

    def by_autograd(dtype: torch.dtype) -> Way:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        y = (
            F.layer_norm(leaves[0], (f,), leaves[1], None, eps)
            if centered
            else F.rms_norm(leaves[0], (f,), leaves[1], eps)
        )
        cotangent = d.to(dtype)
        return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)

    def by_kernel() -> list[Tensor]:
        dx, weights, _ = normalization.backward(d, x, weight, eps, centered, frozenset({"input", "weight"}))
        assert dx is not None
        return [dx, weights.sum(0), weights.square().sum(0)]

    def expected() -> list[Tensor]:
        row = x.double()
        row = row - row.mean(-1, keepdim=True) if centered else row
        weights = (d.double() * row * (row.square().mean(-1, keepdim=True) + eps).rsqrt()).sum(1)
        return [*by_autograd(torch.float64)(), weights.square().sum(0)]

    ways: dict[str, Way] = {BASELINE: by_autograd(dtype), "triton": by_kernel}
    return Case(f"{'LayerNorm' if centered else 'RMSNorm'}, n {n}, t {t}, {f}", ways, expected)


def rows(n: int, t: int, words: int, f: int, dtype: torch.dtype, device: str) -> Case:
    """Ids as frequent as words are, the r-th in proportion to 1/r."""
    from gradstats.kernels import rows

    frequencies = 1 / torch.arange(1, words + 1, device=device)
    ids = torch.multinomial(frequencies, n * t, replacement=True).reshape(n, t)
    d = torch.randn(n, t, f, device=device).to(dtype)

    def expected() -> list[Tensor]:
        gradient = torch.zeros(words, f, dtype=torch.float64, device=device)
        squares, norms = torch.zeros_like(gradient), []
        for one, cotangent in zip(ids, d, strict=True):
            touched, place = one.unique(return_inverse=True)
            c = cotangent.new_zeros(len(touched), f, dtype=torch.float64).index_add_(0, place, cotangent.double())
            gradient[touched] += c
            squares[touched] += c.square()
            norms.append(c.square().sum())
        return [gradient, squares, torch.stack(norms)]

    ways: dict[str, Way] = {
        BASELINE: lambda: [torch.ops.aten.embedding_dense_backward(d, ids, words, -1, False)],
        "triton": partial(flat, partial(rows.sums, ids, d, words, NAMES)),
    }
    return Case(f"n {n}, t {t}, {words:,} words, {f}", ways, expected)


def adam(sizes: Sequence[int], dtype: torch.dtype, device: str) -> Case:
    from gradstats.kernels import adam

    names = ("parameter", "gradient", "sum_of_squares", "exp_avg", "exp_avg_sq")
    own = {"parameter": dtype, "gradient": dtype}
    flat = {name: torch.rand(sum(sizes), device=device).to(own.get(name, torch.float32)) for name in names}
    columns = {name: tensor.split(list(sizes)) for name, tensor in flat.items()}
    scalars = dict.fromkeys(adam.SCALARS, 0.5)
    update = AdamUpdate(Moment(reads=True), statistics=("second_moment",))
    others = [parameter.clone().requires_grad_() for parameter in columns["parameter"]]
    for other, gradient in zip(others, columns["gradient"], strict=True):
        other.grad = gradient
    fused = torch.optim.AdamW(others, fused=True)

    def by_torch() -> list[Tensor]:
        fused.step()
        return []

    def by_kernel() -> list[Tensor]:
        adam.step(names, list(zip(*columns.values(), strict=True)), scalars)
        return [flat["parameter"], flat["exp_avg_sq"]]

    def expected() -> list[Tensor]:
        new = update({name: tensor.double() for name, tensor in flat.items()}, scalars, "both")
        return [new["parameter"], new["exp_avg_sq"]]

    ways: dict[str, Way] = {BASELINE: by_torch, "triton": by_kernel}
    return Case(f"AdamW, {sum(sizes):,} parameters in {len(sizes)} tensors", ways, expected)


def cases(kernel: str, n: int, t: int, dtype: torch.dtype, device: str) -> Iterator[Callable[[], Case]]:
    """Those of a kernel, each made when it is measured."""
    if kernel in ("linear", "step"):
        make = linear if kernel == "linear" else step
        for (o, i), positions in [*itertools.product(LINEAR, [t]), *itertools.product(LINEAR[:4], FEW_POSITIONS)]:
            yield partial(make, n, positions, o, i, dtype, device)
    elif kernel == "normalization":
        for centered in (True, False):
            yield partial(normalization, n, t, WIDTH, centered, dtype, device)
    elif kernel == "rows":
        yield partial(rows, n, t, WORDS, WIDTH, dtype, device)
    else:
        yield partial(adam, SIZES, dtype, device)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def milliseconds(way: Way) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(kernel: str, case: Case, dtype: str, turns: int) -> list[Measurement]:
    """Of every way; the first run, which compiles, is the one whose results are compared."""
    expected = case.expected()
    errors = {name: [error(*pair) for pair in zip(way(), expected, strict=False)] for name, way in case.ways.items()}
    del expected
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    for order in itertools.islice(alternate(case.ways), turns):
        for name in order:
            times[name].append(milliseconds(case.ways[name]))
    return [
        Measurement(
            kernel,
            case.title,
            dtype,
            name,
            errors[name],
            statistics.median(times[name]),
            *ratio(times[name], times[BASELINE]),
        )
        for name in case.ways
    ]


def line(m: Measurement) -> str:
    errors = " ".join(f"{error:.0e}" for error in m.errors)
    return f"  {m.way:28} {m.milliseconds:9.3f} ms  {m.ratio:6.2f} ({m.lower:.2f} to {m.upper:.2f})  errors {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=20, help="measured runs of every way")
    parser.add_argument("--output", type=Path, default=Path("outputs/kernel_benchmark.json"))
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error("--turns: quartiles need at least 2")
    if not torch.cuda.is_available():
        print("no CUDA device: the kernels are for GPUs, and nothing was measured")
        return
    torch.manual_seed(0)
    found: list[Measurement] = []
    for kernel in arguments.kernels:
        for make in cases(kernel, arguments.examples, arguments.positions, DTYPES[arguments.dtype], "cuda"):
            try:
                case = make()
                print(f"{kernel}: {case.title}", flush=True)
                measured = measure(kernel, case, arguments.dtype, arguments.turns)
            except torch.OutOfMemoryError:
                print("  not enough memory on the device")
                continue
            print(*map(line, measured), sep="\n", flush=True)
            found += measured
    save(arguments.output, torch.get_num_threads(), found, "cuda")
    wrong = [m for m in found if m.errors and max(m.errors) > TOLERANCE[arguments.dtype]]
    if wrong:
        raise SystemExit(
            f"errors above {TOLERANCE[arguments.dtype]}: " + "; ".join(f"{m.case}, {m.way}" for m in wrong)
        )


if __name__ == "__main__":
    main()
