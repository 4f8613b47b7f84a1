"""Shards at a URL give the images of local ones, whatever the server does; what it cannot do ends in one line."""

import collections
import functools
import http.server
import io
import re
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data import batches, load, load_pair, remote
from ddpm.files.data.hugging_face import Rows
from ddpm.files.data.remote_rows import RemoteRows
from ddpm.presets import PRESETS
from ddpm.run import survey

pytest.importorskip("aiohttp")

N, SHARDS = 60, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder with ETags, and ranges if `ranges`.

    faults   what the next GETs meet: 500, "cut" (half a body), or seconds of silence
    latency  seconds before each answer
    asked    the requests so far: path and Range
    most     the most requests at once
    """

    def __init__(self, folder, ranges=True, latency=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.latency = Path(folder), ranges, latency
        self.faults, self.asked = collections.deque(), []
        self.now = self.most = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        server.now += 1
        server.most = max(server.most, server.now)
        time.sleep(server.latency)
        server.now -= 1
        asked = self.headers.get("Range")
        if body:
            server.asked.append((self.path, asked))
        fault = server.faults.popleft() if body and server.faults else None
        if fault == 500 or not path.is_file():
            self.send_error(500 if fault else 404)
            return
        if isinstance(fault, float):
            time.sleep(fault)
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "") if server.ranges else None
        if span:
            start, stop = int(span[1]), int(span[2] or len(data) - 1) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            try:
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            except OSError:
                return
            self.close_connection = fault == "cut"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    for k in range(SHARDS):
        with tarfile.open(folder / f"a-{k:03d}.tar", "w") as archive:
            for i in range(k * N // SHARDS, (k + 1) * N // SHARDS):
                for name, data in ((f"{i:04d}.png", pictures.to_png(PIXELS[i])), (f"{i:04d}.cls", b"%d" % (i % 4))):
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
    return folder


@pytest.fixture
def serve(shards):
    servers = []

    def start(**options):
        servers.append(Server(shards, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


stream = functools.partial(load, size=(8, 8), channels=3)
SOME = "a-{000..002}.tar"


def same(found, local):
    assert torch.equal(found.batch(range(len(found))), local.batch(range(len(local))))
    assert torch.equal(found.labels, local.labels)
    assert (found.class_names, found.names()[0].partition(" in ")[0]) == (local.class_names, "0000.png")
    return True


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("ranges", [True, False])
def test_shards_of_a_server_are_those_of_the_folder(serve, shards, ranges, cache_bytes):
    server = serve(ranges=ranges)
    found = stream(f"{server.url}/{SOME}", cache_bytes=cache_bytes)
    assert same(found, stream(str(shards)))
    assert (found.shards is None) == ranges
    if not ranges:
        assert (found.shards.sizes, found.shards.window) == ([20] * 3, 10_000)


def test_parts_are_kept_up_to_the_limit_and_the_index_for_the_next_start(serve, cache):
    server = serve()
    found = stream(f"{server.url}/{SOME}", cache_bytes=0)
    found.batch(range(N))
    assert len(list(cache.glob("parts/*/[!.]*"))) <= 1
    server.asked.clear()
    found = stream(f"{server.url}/{SOME}", cache_bytes=5000)
    assert {span for _, span in server.asked} >= {"bytes=0-0"}
    assert not any(span and int(span.split("-")[1]) > 200_000 for _, span in server.asked)  # no headers are read again
    found.batch(range(N))
    assert sum(path.stat().st_size for path in cache.glob("parts/*/*")) < 5000 + 5000 // 16 + 300


@pytest.mark.filterwarnings("ignore:.*enlarged")
def test_a_second_epoch_asks_for_nothing(serve):
    """Decoded images take more than the cache, but their files do not."""
    server = serve()
    found = load(f"{server.url}/{SOME}", (32, 32), 3, cache_bytes=100_000)
    assert not found.decoded
    first = found.batch(range(N))
    server.asked.clear()
    assert torch.equal(found.batch(range(N)), first)
    assert not server.asked


def test_labels_come_with_the_index(serve):
    """No request is made for a label of its own."""
    server = serve()
    stream(f"{server.url}/{SOME}", cache_bytes=0)
    assert len(server.asked) < 3 * SHARDS + 40  # 32 images are looked at


def test_requests_of_a_batch_wait_together(serve):
    server = serve(latency=0.2)
    found = stream(f"{server.url}/{SOME}", cache_bytes=0)
    server.most = 0
    found.batch([5])
    assert server.most == 1
    found.batch(range(16))
    assert server.most > 4


@pytest.mark.parametrize("ranges", [True, False])
def test_faults_that_pass_change_nothing(serve, shards, ranges, monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT", 1.0)
    server = serve(ranges=ranges)
    if ranges:
        stream(f"{server.url}/{SOME}", cache_bytes=0)  # so that the faults meet images, too
    server.faults.extend([500, "cut", 500, "cut", *([2.5] if ranges else [])])
    found = stream(f"{server.url}/{SOME}", cache_bytes=0)
    assert same(found, stream(str(shards)))
    assert len(server.faults) == 0


@pytest.mark.parametrize("fault", [500, "cut", 2.5])
def test_faults_that_stay_end_in_one_line(serve, fault, monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "_TRIES", 2)
    server = serve()
    found = stream(f"{server.url}/{SOME}", cache_bytes=0)
    server.faults.extend([fault] * 10)
    with pytest.raises(InputError, match=rf"0007\.png in {server.url}/a-000\.tar: .*tried 2 times") as caught:
        found.batch([7])
    assert "\n" not in str(caught.value)
    server.faults.clear()


def test_what_is_not_there_is_named_at_once(serve):
    server = serve()
    for url, match in (
        (f"{server.url}/none.tar", r"none\.tar: cannot be read \((404|not there)\)"),
        (f"{server.url}/a-{{000..009}}.tar", r"a-003\.tar: cannot be read \((404|not there)\)"),
        ("http://127.0.0.1:9/a.tar", "a.tar: "),
        ("nosuch://a/b.tar", r"nosuch.*want a URL of s3"),
        ("memory://nothing/here", "0 files"),
    ):
        begun = time.monotonic()
        with pytest.raises(InputError, match=match) as caught:
            stream(url)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begun < 20


def test_a_shard_that_changes_is_read_again(serve, shards):
    server = serve()
    before = stream(f"{server.url}/{SOME}", cache_bytes=0)
    with tarfile.open(shards / "a-001.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0020.cls"))
        about = tarfile.TarInfo("0020.png")
        about.size = len(pictures.to_png(PIXELS[3]))
        archive.addfile(about, io.BytesIO(pictures.to_png(PIXELS[3])))
    after = stream(f"{server.url}/{SOME}", cache_bytes=0)
    assert len(after) == N - 19
    assert torch.equal(after.batch([20])[0], torch.from_numpy(PIXELS[3]).permute(2, 0, 1))
    assert before.fingerprint != after.fingerprint


def test_pages_of_images_in_order_are_refused(serve, shards):
    """Whole tar files and parquet files are read in order."""
    match = r"^pages images: .* is read in order; want a copy of its files, or pages first"
    with pytest.raises(InputError, match=match):
        stream(f"{serve(ranges=False).url}/{SOME}", pages="images")
    rows = [{"image": {"bytes": pictures.to_png(PIXELS[i]), "path": None}} for i in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(shards / "train-0.parquet")
    with pytest.raises(InputError, match=match):
        stream(f"{serve().url}/train-0.parquet", pages="images")


@pytest.mark.parametrize("ranges", [True, False])
def test_ranks_and_workers_visit_each_image_once(serve, ranges):
    """An epoch as a multiset, for 1, 2 and 3 ranks, with fewer workers than steps and with more, from any step on."""
    server = serve(ranges=ranges)
    train, _ = load_pair(f"{server.url}/{SOME}", (8, 8), 3, cache_bytes=0, shuffle_window=16)
    n, batch = len(train), 19  # 57 images
    assert n == 3 * batch
    every = {bytes(image.numpy()): i for i, image in enumerate(train.batch(range(n)))}
    for ranks, workers, start in ((1, 0, 0), (2, 0, 0), (3, 2, 0), (2, 2, 1), (1, 4, 2)):
        seen = []
        for rank in range(ranks):
            part = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
            for images in batches(train, 7, batch, start, 3, part=part, workers=workers):
                seen += [every[bytes(image.numpy())] for image in images]
        want = torch.cat([train.order(7, step, batch) for step in range(start, 3)]).tolist()
        assert sorted(seen) == sorted(want)
        assert len(set(seen)) == n - start * batch


def test_the_memory_file_system(shards):
    fs = fsspec.filesystem("memory")
    for path in sorted(shards.glob("*.tar")):
        fs.pipe(f"/bucket/{path.name}", path.read_bytes())
    for url in ("memory://bucket", "memory://bucket/*.tar", f"memory://bucket/{SOME}"):
        assert same(stream(url, cache_bytes=0), stream(str(shards)))
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet_files_at_a_url(embedded, tmp_path, serve, shards):
    """With images in the rows; and with paths, of which those outside the source need allow_paths."""
    cells = [{"bytes": pictures.to_png(image), "path": None} for image in PIXELS]
    if not embedded:
        for i, image in enumerate(PIXELS):
            pictures.save(tmp_path / "pictures" / f"{i}.png", image)
        cells = [{"bytes": None, "path": str(tmp_path / "pictures" / f"{i}.png")} for i in range(N)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(N)]}, features)
    rows.to_parquet(shards / "train-0.parquet")
    if not embedded:  # to_parquet embeds the files
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"image": cells, "label": [i % 2 for i in range(N)]})
        pq.write_table(table, shards / "train-0.parquet")
    server = serve()
    if not embedded:
        with pytest.raises(InputError, match=r"names the file .*allow_paths"):
            stream(f"{server.url}/train-0.parquet")
    found = stream(f"{server.url}/train-0.parquet", cache_bytes=0, allow_paths=True)
    assert torch.equal(found.batch(range(N)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert found.labels.tolist() == [i % 2 for i in range(N)]
    server.asked.clear()
    stream(f"{server.url}/train-0.parquet", cache_bytes=0, allow_paths=True)
    assert {span for _, span in server.asked} == {"bytes=0-0"}


@pytest.mark.parametrize("ranges", [True, False])
def test_row_groups_are_read_in_order_by_their_ranges(tmp_path, serve, shards, ranges, cache):
    """Splits, labels and images are those of the local files; an epoch visits each image once, within the window."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, rows in {"train-0": range(25), "train-1": range(25, 48), "test-0": range(48, N)}.items():
        cells = [{"bytes": pictures.to_png(PIXELS[i]), "path": None} for i in rows]
        table = pa.table({"image": cells, "text": ["x" * 60_000] * len(rows), "label": [f"c{i % 3}" for i in rows]})
        pq.write_table(table, shards / f"{name}.parquet", row_group_size=10, use_dictionary=False, compression="none")
    server = serve(ranges=ranges)
    url = f"{server.url}/{{train-0,train-1,test-0}}.parquet"
    train, test = load_pair(url, (8, 8), 3, cache_bytes=0, shuffle_window=8)
    assert torch.equal(train.batch(range(48)), torch.from_numpy(PIXELS[:48]).permute(0, 3, 1, 2))
    assert torch.equal(test.batch(range(12)), torch.from_numpy(PIXELS[48:]).permute(0, 3, 1, 2))
    assert len(list(cache.glob("parts/*/*g"))) == 8  # those of the last minute stay, whatever --cache-bytes
    assert train.labels.tolist() == [i % 3 for i in range(48)]
    assert (train.class_names, train.split, test.split) == (("c0", "c1", "c2"), "train", "test")
    assert (train.shards.sizes, train.shards.window) == ([10, 10, 5, 10, 10, 3], 8)
    assert torch.equal(train.batch([40, 3, 3, 27]), torch.from_numpy(PIXELS[[40, 3, 3, 27]]).permute(0, 3, 1, 2))
    if ranges:  # the column of texts is most of the file
        read = sum(int(span[6:].split("-")[1]) - int(span[6:].split("-")[0]) + 1 for _, span in server.asked if span)
        assert read < sum(path.stat().st_size for path in shards.glob("*.parquet"))
    for workers in (0, 2):
        stream_of = batches(train, 1, 12, 0, 4, workers=workers)
        assert len({bytes(image) for batch in stream_of for image in batch.numpy()}) == 48
    server.faults.extend([500, "cut"])
    again = load_pair(url, (8, 8), 3, cache_bytes=0, shuffle_window=8)
    assert [part.fingerprint for part in again] == [train.fingerprint, test.fingerprint]
    assert load_pair(url, (8, 8), 3, cache_bytes=0, shuffle_window=9)[0].fingerprint != train.fingerprint
    with pytest.raises(InputError, match="image_column img: no such column"):
        stream(url, image_column="img")
    with pytest.raises(InputError, match="label_column half: no such column"):
        stream(url, label_column="half")


def test_threads_share_the_row_groups_that_are_kept_open():
    """One of them may close the group that another one is about to close or to read."""
    import pyarrow as pa

    class File:
        def kept(self, name, _):
            return ipc

    sink = pa.BufferOutputStream()
    table = pa.table({"image": [b"0"]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    ipc = sink.getvalue()
    groups = np.stack([np.zeros(64, np.int64), np.arange(64)], 1)
    rows = RemoteRows([File()], groups, np.arange(1, 65), "image", Rows("a", None))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda i: next(rows.fetch([i % 64])), range(6400))
            assert set(found) == {b"0"}
    finally:
        sys.setswitchinterval(before)
    assert len(rows.opened) < 4 + 8


def test_two_columns_of_one_file_are_kept_apart(serve, shards):
    """What is kept of a row group is that of its column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"photo": PIXELS[:4], "negative": 255 - PIXELS[:4]}
    cells = {k: [{"bytes": pictures.to_png(x), "path": None} for x in images] for k, images in columns.items()}
    pq.write_table(pa.table(cells), shards / "two.parquet")
    url = f"{serve().url}/two.parquet"
    for name, images in columns.items():
        found = load_pair(url, (8, 8), 3, image_column=name)
        seen = {bytes(image.numpy()) for part in found for image in part.batch(range(len(part)))}
        assert seen == {bytes(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in images}


def test_a_damaged_parquet_file_at_a_url_is_named(serve, shards):
    (shards / "a.parquet").write_bytes(b"PAR1" + bytes(3000))
    server = serve()
    with pytest.raises(InputError, match=r"a\.parquet: damaged parquet file"):
        stream(f"{server.url}/a.parquet")


def test_a_look_at_a_source_keeps_what_others_read(serve, cache):
    """`ddpm data` holds no image in memory, and leaves the parts on the disk."""
    url = f"{serve().url}/{SOME}"
    stream(url)
    kept = set(cache.glob("parts/*/*"))
    assert len(kept) > 10
    survey.survey(url, replace(PRESETS["digits"], channels=3), 5)
    assert kept <= set(cache.glob("parts/*/*"))
