"""Copy the first rows of CIFAR-10's training images into one parquet file for `benchmarks/gpu.py --data`.

    python benchmarks/cut_cifar10.py FOLDER [--rows 15000] [--out benchmarks/cache/cifar10-15000.parquet]

FOLDER is a copy of uoft-cs/cifar10 from the hub, with a file train-*.parquet at any depth. 15,000 rows take about
34 MB. The script does not change images or labels. git ignores benchmarks/cache.
"""

import argparse
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def cut(folder: Path, rows: int, out: Path) -> int:
    """Write the first `rows` training images of `folder` to `out`. Returns the size of the file in bytes."""
    files = sorted(folder.rglob("train-*.parquet"))
    if not files:
        raise SystemExit(f"cut_cifar10.py: {folder}: holds no file train-*.parquet; want a copy of uoft-cs/cifar10")
    count = sum(pq.read_metadata(file).num_rows for file in files)
    if not 1 <= rows <= count:
        raise SystemExit(f"cut_cifar10.py: --rows {rows}: want 1 to {count:,}, the rows of {folder}")
    first = pa.concat_tables([pq.read_table(file) for file in files]).slice(0, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.new")
    pq.write_table(first, new)
    new.replace(out)
    return out.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a copy of uoft-cs/cifar10")
    parser.add_argument("--rows", type=int, default=15_000, help="number of images (%(default)s)")
    parser.add_argument("--out", type=Path, help="(benchmarks/cache/cifar10-ROWS.parquet)")
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / f"cache/cifar10-{args.rows}.parquet"
    print(f"{out}: {args.rows:,} rows, {cut(args.folder, args.rows, out) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
