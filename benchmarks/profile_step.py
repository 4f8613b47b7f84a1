"""Find where one training step and one sampling call spend their time, with torch.profiler.

    python benchmarks/profile_step.py [--network paper] [--batch 16] [--plain]

The time of each operation on the CPU, without the operations that it calls, counts for the first group of GROUPS that
matches its name. If none matches, it counts for the group of the operation that calls it: a multiplication inside a
dropout is dropout. The operations of this package have names too: an autograd Function, a custom operation ddpm::NAME,
or C code in record_function("ddpm.conv"), "ddpm.norm" and so on. Time outside all operations is Python.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import figures
import peers
import record
from speed import BEST, NETWORKS
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm import samplers
from ddpm.presets import build

GROUPS = {
    "optimiser and average": r"optimizer|adam|_foreach_|lerp|vector_norm|clip_grad",
    "convolutions and matrix products": r"conv|\bmm$|addmm|bmm|matmul|linear$|attention|sdpa|gemm|onednn",
    "norms": r"norm",
    "activations": r"silu|swish|gelu|relu|sigmoid",
    "dropout": r"dropout|bernoulli",
    "casts and copies": r"copy|clone|contiguous|\bcat$|_to\b|\bpad|constant_pad|upsample|interpolate|fill_|zero_|cast",
}
OTHER, PYTHON = "other operations", "outside operations (Python)"
WHOLE = "benchmark: whole"


def group(event: Any) -> str:
    """The group for the time of an event of the profiler."""
    while event is not None and event.name != WHOLE:
        for name, pattern in GROUPS.items():
            if re.search(pattern, event.name, re.IGNORECASE):
                return name
        event = event.cpu_parent
    return OTHER


def profiled(function: Callable[[], object], calls: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds per call, by group and by operation. Two calls before warm up."""
    for _ in range(2):
        function()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            with record_function(WHOLE):
                function()
    groups, operations = Counter[str](), Counter[str]()
    for event in profiler.events():
        own = event.self_cpu_time_total / 1000 / calls
        if event.name == WHOLE:
            groups[PYTHON] += own
        elif event.cpu_parent is not None:  # an operation inside the measured function
            groups[group(event)] += own
            operations[event.name] += own
    return dict(groups.most_common()), dict(operations.most_common(15))


def shares(groups: dict[str, float]) -> dict[str, float]:
    """The fraction of the total for each group."""
    total = sum(groups.values())
    return {name: value / total for name, value in groups.items()}


def programs(network: str, batch: int, precision: Any) -> dict[str, Callable[[], object]]:
    """One training step, and one step of DDIM with everything that it does around the network call."""
    preset = NETWORKS[network][0]
    denoiser, x = build(replace(preset, precision=precision)), peers.batch(preset, batch)
    denoiser.network.eval()  # type: ignore[attr-defined]
    return {
        "training step": peers.Ours(preset, batch, precision).step,
        "sampling call": lambda: next(samplers.ddim(denoiser, x, steps=50)),
    }


def main() -> None:
    parser = record.parser(__doc__, seconds=0)
    parser.add_argument("--network", choices=NETWORKS, default="paper")
    parser.add_argument("--precision", choices=("bf16", "float32"), default=BEST)
    parser.add_argument("--batch", type=int, default=16, help="images per call (%(default)s)")
    args = parser.parse_args()
    values: dict[str, Any] = {}
    text = f"The {args.network} network, {args.precision}, batch {args.batch}; the profiler itself takes some time. "
    text += "`_Convolution` and its backward are our kernels: their time contains norm, swish and dropout.\n\n"
    with record.measuring(args):
        for name, function in programs(args.network, args.batch, args.precision).items():
            profiles = [profiled(function, 1) for _ in range(args.repeats)]
            names = list(dict.fromkeys(key for groups, _ in profiles for key in groups))
            part = {key: figures.spread(100 * shares(groups).get(key, 0.0) for groups, _ in profiles) for key in names}
            time = {key: figures.spread(groups.get(key, 0.0) for groups, _ in profiles) for key in names}
            values[name] = [{"groups_ms": groups, "operations_ms": operations} for groups, operations in profiles]
            total = figures.spread(sum(groups.values()) for groups, _ in profiles)
            text += f"## {name}: {total} ms\n\n"
            text += figures.table(["", "ms", "share, %"], [(key, time[key], part[key]) for key in names])
            operations = "; ".join(f"`{key}` {value:.3g}" for key, value in profiles[-1][1].items())
            text += f"\nThe longest operations of the last repeat, ms: {operations}\n\n"
    suffix = "-plain" if args.plain else ""
    record.write(f"profile{suffix}", "Where a training step and a sampling call spend their time", args, values, text)


if __name__ == "__main__":
    main()
