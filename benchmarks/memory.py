"""Measure the peak memory of one training step: by precision, by parts of the batch, and with checkpointing.

    python benchmarks/memory.py [--networks cifar10 celebahq256 ...] [--batch N] [--device cuda]

A case is a step of `ddpm train` in a process of its own. The figure contains weights, gradients, the optimizer's
moments, the moving average and activations. On the CPU it is the peak resident set minus that after the imports; on a
GPU it is what the allocator held at most in five steps, since the fourth one captures the CUDA graph. A case for which
the memory does not suffice has its error in the record.

On the CPU the paper's network for 256x256 has batch 1, and one of a quarter of its width has batch 8, because a step of
the paper's 64 images takes half an hour. bf16 runs only where the hardware has it. So beside the figures stands what
the backward pass needs of the forward pass for each image, in float32 and in bf16. It is counted operation by
operation, and nothing is computed. The count is of PyTorch's own operations with the rules of autocast on a CPU.
Compiled stages and the kernels of this package need less, and the norms of a GPU in bf16 more, since they compute in
float32.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import record

from ddpm.presets import PRESETS, Precision, Preset

Values = dict[str, Any]
NETWORKS: dict[str, tuple[Preset, int]] = {
    "cifar10": (PRESETS["cifar10"], 128),
    "celebahq256, width 32": (replace(PRESETS["celebahq256"], width=32), 8),
    "celebahq256": (PRESETS["celebahq256"], 1),
}
"""Name -> its preset, and the batch on the CPU. On a GPU it is the batch of the preset."""
PARTS = 1, 2, 4
GIB, MIB = 2**30, 2**20


def cases(batch: int, precision: Precision) -> dict[str, Values]:
    """Settings by name: each number of parts in float32, and the whole batch in `precision` and with checkpointing."""
    kinds: dict[str, Values] = {"float32": {"precision": "float32"}}
    if precision != "float32":
        kinds[precision] = {"precision": precision}
    kinds[f"{precision}, checkpointing"] = {"precision": precision, "gradient_checkpointing": True}
    return {
        f"{kind}, {batch // parts} x {parts}": {**settings, "batch_size": batch, "accumulate": parts}
        for kind, settings in kinds.items()
        for parts in (PARTS if kind == "float32" else PARTS[:1])
        if batch % parts == 0
    }


def saved_bytes(preset: Preset, precision: Precision) -> int:
    """Bytes for each image that the backward pass of the network needs of the forward pass, without checkpointing."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ddpm import kernels
    from ddpm.presets import build

    def saved(count: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.empty(count, *preset.shape), torch.zeros(count, dtype=torch.int64))
        return sum(storage.nbytes() for storage in kept.values())

    network = build(replace(preset, precision=precision)).network
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.disabled():
        return saved(2) - saved(1)


def peak(device: str) -> float:
    """The peak memory of this process so far, in bytes."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_reserved())
    import resource

    kib = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib)


def limit() -> None:
    """Let an allocation fail that nine tenths of the free memory do not hold, before the system ends a process."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    most = used + int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def child(network: str, settings: Values, device: str) -> Values:
    """Measure one case in this process."""
    import peers

    from ddpm import optimizers

    if device == "cpu" and sys.platform == "linux":
        limit()
    base = peak(device) if device == "cpu" else 0.0
    preset = replace(NETWORKS[network][0], **settings)
    ours = peers.Ours(preset, preset.batch_size, preset.precision, device)
    model = ours.training.model
    optimizers.begin(model.optimizers, 0)
    for moment in model.moments().values():
        moment.fill_(0)  # the system gives a page only when it is written
    for _ in range(5 if device == "cuda" else 1):
        loss = ours.step()
    return {"bytes": peak(device) - base, "loss": float(loss), "parameters": sum(p.numel() for p in model.weights)}


def measure(network: str, settings: Values, device: str, threads: int | None = None) -> Values:
    """`child` in a process of its own."""
    case = json.dumps({"network": network, "settings": settings, "device": device})
    command = [sys.executable, str(Path(__file__)), "--child", case]
    if threads:
        command += ["--threads", str(threads)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        return {"error": (out.stderr.strip().splitlines() or [f"exit {out.returncode}"])[-1]}
    result: Values = json.loads(out.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, help="images per step (on the CPU 128, 8 and 1; on a GPU the preset's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", type=json.loads, help="measure one case in this process")
    args = parser.parse_args()
    with record.measuring(args):
        if args.child:
            print(json.dumps(child(**args.child)))
            return
        import torch

        from ddpm.run.processes import pick_precision

        values, text = {}, ""
        for network in args.networks:
            preset, batch = NETWORKS[network]
            batch = args.batch or (batch if args.device == "cpu" else preset.batch_size)
            rows = []
            for name, settings in cases(batch, pick_precision("auto", torch.device(args.device))).items():
                result = values[f"{network}, {name}"] = measure(network, settings, args.device, args.threads)
                size = f"{result['bytes'] / GIB:.2f}" if "bytes" in result else result["error"]
                rows.append([name, size])
                print(network, *rows[-1], sep=" | ", file=sys.stderr, flush=True)
            counted = {precision: saved_bytes(preset, precision) for precision in ("float32", "bf16")}
            values[f"{network}, counted"] = counted
            text += f"## {network}, batch {batch} (the preset's is {preset.batch_size})\n\n"
            text += figures.table(["images of a part x parts", "peak, GiB"], rows)
            kept = " and ".join(f"{size / MIB:.0f} MiB in {precision}" for precision, size in counted.items())
            text += f"\nCounted: for each image of a part the backward pass needs {kept}, without checkpointing.\n\n"
    record.write("memory", "Peak memory of a training step", args, values, text, args.device)


if __name__ == "__main__":
    main()
