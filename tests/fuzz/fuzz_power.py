"""Fuzz power: cut the power of a disk at random moments while files, folders and checkpoints are saved to it.

    python tests/fuzz/fuzz_power.py [--tries 300]

Each try saves until the power is lost, recovers the file system, and looks for every save that was reported complete.
tests/power.py says what the disk is. A tenth as many tries may not sync folders, files, or anything: the controls. It
needs root, Linux and ext4. pytest does not collect this folder.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import figures
import power
import record
import torch
from tqdm import tqdm


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if reason := power.missing():
        raise SystemExit(f"{reason}; want root on Linux, with loop devices and e2fsprogs")
    torch.set_num_threads(1)  # the saving process is forked
    chance, results = random.Random(args.seed), {}
    for syncs in power.SYNCS:
        counts = dict.fromkeys(("tries", "saves", "lost", "tries_with_losses", "torn", "damaged_checkpoints"), 0)
        with tempfile.TemporaryDirectory() as folder, power.disk(Path(folder)) as disk:
            first = 1
            for _ in tqdm(range(args.tries if syncs == "all" else args.tries // 10), syncs):
                found, first = power.lose(disk, chance, first, syncs)
                counts["tries"] += 1
                counts["saves"] += found.saves
                counts["lost"] += len(found.lost)
                counts["tries_with_losses"] += bool(found.lost)
                counts["torn"] += len(found.torn)
                counts["damaged_checkpoints"] += found.damaged
                if syncs == "all" and (found.lost or found.torn or found.damaged):
                    print(found, flush=True)
        results[syncs] = counts
    columns = [name.replace("_", " ") for name in results["all"]]
    rows = [[syncs, *(f"{n:,}" for n in counts.values())] for syncs, counts in results.items()]
    text = (
        f"The power of a disk (ext4) is cut in the midst of saves, seed {args.seed}. `lost` are saves that "
        "were reported complete and are not whole afterwards. `torn` are files and folders under their final names "
        "that are not whole. Damaged checkpoints are recognised, and counted again at each try while they lie there. "
        "The other rows are controls, in which the saving process may sync files only, folders only, or nothing.\n\n"
    )
    record.write(
        "fuzz-power", "Losses of power", args, {"syncs": results}, text + figures.table(["synced", *columns], rows)
    )


if __name__ == "__main__":
    main()
