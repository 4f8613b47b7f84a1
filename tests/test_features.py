"""Feature networks and statistics from files: the right ones are taken, all others refused in one line."""

import hashlib
import http.server
import json
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ddpm import metrics
from ddpm.errors import InputError
from ddpm.files import data, features
from ddpm.inception import Inception
from ddpm.metrics import Moments, frechet_distance, moments

SHARED = Path(__file__).parents[1] / "../shared"


def refused(call, *words):
    """That it raises an InputError of one line with all these words; the line."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line
    return line


# -- Inception ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    net = Inception().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # keeps the signal alive through all layers
    return net


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    """A stand-in for the published file: its names (no counters), and the old format that it has."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def published(weights, monkeypatch):
    """As if the stand-in were the published file; its hash."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "SHA256", digest)
    return digest


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_published_hash_is_the_one_in_the_names():
    assert features.SHA256.startswith("6726825d")
    assert len(bytes.fromhex(features.SHA256)) == 32
    assert all("2015-12-05-6726825d.pth" in name for name in (features.WEIGHTS, *features.URLS))


def test_inception_from_a_file(network, weights, published, pixels):
    found = features.inception(weights, progress=False)
    before = torch.random.get_rng_state()
    rows, probabilities = found(pixels)
    expected, logits = network(pixels)
    assert (rows == expected.double().numpy()).all()
    np.testing.assert_allclose(probabilities, logits.double().softmax(1).numpy(), rtol=1e-6)
    assert rows.std(1).min() > 0.1  # not vacuous
    assert probabilities.max() > 2 / 1008
    assert (found.name, found.weights) == ("inception-2015-12-05", published)
    assert torch.equal(before, torch.random.get_rng_state())
    grey, _ = found(pixels[:1, :1])
    assert (grey == found(pixels[:1, :1].repeat(1, 3, 1, 1))[0]).all()
    refused(lambda: found(pixels[:, :2]), "2 channels", "1 or 3")
    with pytest.raises(InputError, match="images float32 of 3 channels: Inception wants uint8 of 1 or 3"):
        found(pixels.float())


def test_precision_is_not_what_training_has_set(weights, published, pixels):
    """bf16 by autocast, TensorFloat-32 in products of matrices and convolutions."""
    found = features.inception(weights)
    expected, _ = found(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert (found(pixels)[0] == expected).all()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        with features._exact(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.enabled
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same(weights, published, pixels):
    a, b = (features.inception(weights, device=device)(pixels) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(b[0], a[0], rtol=1e-3, atol=1e-4 * a[0].std())
    np.testing.assert_allclose(b[1], a[1], rtol=1e-3)


def test_another_file_is_refused_unless_allowed(weights, pixels):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    refused(lambda: features.inception(weights), weights, digest, features.SHA256)
    assert features.inception(weights, any_weights=True).weights == digest


def test_all_key_layouts_give_the_same(network, weights, pixels, tmp_path):
    """torch-fidelity's module adds counters; pytorch-fid's puts the parts into numbered blocks, with no classifier."""
    expected, classes = features.inception(weights, any_weights=True)(pixels)

    def load(state):
        torch.save(state, tmp_path / "other.pth")
        return features.inception(tmp_path / "other.pth", any_weights=True)(pixels)

    with_counters = load(network.state_dict())
    assert (with_counters[0] == expected).all()
    assert (with_counters[1] == classes).all()

    part = dict(network.named_children())
    numbered = nn.Module()
    numbered.blocks = nn.ModuleList(
        [
            nn.Sequential(*(part[f"Conv2d_{n}"] for n in ("1a_3x3", "2a_3x3", "2b_3x3")), nn.MaxPool2d(3, 2)),
            nn.Sequential(*(part[f"Conv2d_{n}"] for n in ("3b_1x1", "4a_3x3")), nn.MaxPool2d(3, 2)),
            nn.Sequential(*(part[f"Mixed_{n}"] for n in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"))),
            nn.Sequential(*(part[f"Mixed_{n}"] for n in ("7a", "7b", "7c")), nn.AdaptiveAvgPool2d(1)),
        ]
    )
    rows, none = load(numbered.state_dict())
    assert (rows == expected).all()
    assert none is None


def test_every_key_and_shape_is_accounted_for(network, tmp_path):
    path = tmp_path / "weights.pth"

    shapes = {name: value.new_zeros(()).expand(value.shape) for name, value in network.state_dict().items()}

    def load(**changes):
        state = {**shapes, **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        return lambda: features.inception(path, any_weights=True)

    name = "Mixed_7a.branch3x3_1.conv.weight"
    refused(load(**{name: None}), path, "lacks", name)
    refused(load(**{"AuxLogits.conv0.weight": torch.zeros(1)}), path, "unknown AuxLogits.conv0.weight")
    refused(load(**{name: torch.zeros(192, 768)}), name, "[192, 768]", "[192, 768, 1, 1]")
    refused(load(**{"fc.bias": torch.zeros(1000)}), "fc.bias", "[1000]", "[1008]")  # torchvision's
    refused(load(**{"fc.bias": torch.zeros(1008, dtype=torch.int64)}), "fc.bias is int64")
    refused(load(**{"fc.bias": None}), "lacks fc.bias")


def test_weights_in_safetensors(network, weights, pixels, tmp_path):
    save_file({name: value.clone() for name, value in network.state_dict().items()}, tmp_path / "weights.safetensors")
    found = features.inception(tmp_path / "weights.safetensors", any_weights=True)(pixels)
    assert (found[0] == features.inception(weights, any_weights=True)(pixels)[0]).all()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    for content in (b"", b"<html>", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        refused(lambda: features.inception(path, any_weights=True), path, "not plain weights")
    torch.save({"fc.weight": Evil()}, path)
    refused(lambda: features.inception(path, any_weights=True), path, "not plain weights")
    assert not (tmp_path / "touched").exists()
    torch.save([torch.zeros(1)], path)
    refused(lambda: features.inception(path, any_weights=True), path, "names and tensors")
    path = tmp_path / "weights.safetensors"
    for content in (b"", bytes(range(256)) * 8, b"\xff" * 2000, b"\x08" + b"\0" * 7 + b"{}      "):
        path.write_bytes(content)
        refused(lambda: features.inception(path, any_weights=True), path)
    refused(lambda: features.inception(tmp_path / "none.pth"), "none.pth: no such file", features.WEIGHTS)


@pytest.fixture
def server(weights, monkeypatch, tmp_path):
    """Serves `server.content` in place of the two release pages; `server.asked` lists what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            content = self.server.content.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + self.server.missing))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.content, server.missing = [], {"/a": weights.read_bytes()}, 0
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(features, "URLS", (f"{address}/a", f"{address}/b"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


def cached(tmp_path):
    folder = tmp_path / "cache/ddpm"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_weights_are_fetched_once_with_a_bar(server, published, weights, tmp_path, capsys):
    assert features.inception().weights == published
    assert "Inception's weights" in capsys.readouterr().err
    assert cached(tmp_path) == [features.WEIGHTS]
    assert (tmp_path / "cache/ddpm" / features.WEIGHTS).read_bytes() == weights.read_bytes()
    features.inception(progress=False)
    assert server.asked == ["/a"]
    assert capsys.readouterr().err == ""


def test_the_second_place_is_tried(server, published, weights, tmp_path):
    server.content = {"/b": server.content["/a"]}
    features.inception(progress=False)
    assert server.asked == ["/a", "/b"]


@pytest.mark.parametrize("fault", ["another file", "cut short", "not there"])
def test_a_failed_download_leaves_nothing(server, published, tmp_path, fault):
    if fault == "another file":
        server.content = {"/a": b"log in first"}
        words = [hashlib.sha256(b"log in first").hexdigest(), published]
    elif fault == "cut short":
        server.content, server.missing = {"/a": b"12345"}, 5
        words = []
    else:
        server.content, words = {}, ["404"]
    url = features.URLS[0]
    refused(lambda: features.inception(progress=False), "cannot be downloaded", url, tmp_path / "cache/ddpm", *words)
    assert cached(tmp_path) == []


def test_without_a_network_it_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def down(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", down)
    url = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
    refused(lambda: features.inception(progress=False), "name resolution", url, tmp_path / "cache/ddpm")
    assert cached(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "ddpm" / features.WEIGHTS).write_bytes(b"half")
    refused(features.inception, tmp_path / "ddpm" / features.WEIGHTS, "SHA-256", features.SHA256)


def test_the_cache_is_at_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert features.cache() == tmp_path / ".cache/ddpm"


# -- the user's own ----------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """Writes FILE.py; `script(text)` gives its path."""

    def write(text):
        path = tmp_path / "mine.py"
        path.write_text("import numpy as np\n" + text)
        return path

    return write


def test_a_function_of_the_users(script, pixels):
    path = script("def mean(x):\n    assert x.dtype == np.uint8 and x.flags.c_contiguous\n    return x.mean((1, 2))\n")
    found = features.custom(f"{path}:mean")
    rows, none = found(pixels)
    np.testing.assert_allclose(rows, pixels.double().mean((2, 3)).numpy())  # so it saw N, H, W, C
    assert none is None
    assert (found.name, found.weights) == ("mine.py:mean", hashlib.sha256(path.read_bytes()).hexdigest())


def test_with_probabilities_and_help_from_beside_the_file(script, pixels, tmp_path):
    (tmp_path / "beside_mine.py").write_text("def probabilities(n):\n    return [[0.5, 0.5]] * n\n")
    path = script("from beside_mine import probabilities\ndef both(x):\n    return x[:, 0, 0], probabilities(len(x))\n")
    rows, classes = features.custom(f"{path}:both")(pixels)
    assert (rows == pixels[:, :, 0, 0].numpy()).all()
    assert (classes == 0.5).all()


def test_a_wrong_specification(script, tmp_path):
    path = script("def one(x): pass\nclass Two: pass\nthree = 3\n")
    for spec in ("mine.py", "mine:one", f"{path}:", f"{path}:a b", ""):
        refused(lambda spec=spec: features.custom(spec), spec, "want FILE.py:function")
    refused(lambda: features.custom(f"{tmp_path}/none.py:f"), "no such file")
    for name in ("four", "three"):
        refused(lambda name=name: features.custom(f"{path}:{name}"), f"no function {name}", "Two, one")
    for text in ("def (", "import nothing_like_it", "1 / 0", "raise SystemExit(3)"):
        refused(lambda text=text: features.custom(f"{script(text)}:f"), "mine.py", "cannot be imported")


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        ("x", ["shape [2, 32, 32, 3]", "want [2, D]"]),
        ("x[:1, 0, 0]", ["shape [1, 3]", "want [2, D]"]),
        ("x[:, 0, 0, :0]", ["shape [2, 0]"]),
        ("x[:, 0, 0] * np.array([[1.0], [np.nan]])", ["nan or inf in row 1"]),
        ("None", ["want"]),
        ("['a', 'b']", ["not an array of numbers"]),
        ("(x[:, 0, 0], x[:1, 0, 0])", ["probabilities: shape [1, 3]"]),
        ("(x[:, 0, 0], None, None)", ["returned 3 values"]),
        ("x[99]", ["IndexError"]),
    ],
)
def test_a_wrong_function(script, pixels, returns, words):
    path = script(f"def f(x):\n    return {returns}\n")
    refused(lambda: features.custom(f"{path}:f")(pixels), "mine.py:f", *words)


def test_features_from_a_file(tmp_path):
    path, rows = tmp_path / "features.npz", np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(path, other=np.zeros(3), features=rows, probabilities=np.full((3, 4), 0.25))
    found, classes = features.read_features(path)
    assert (found == rows).all()
    assert found.dtype == np.float64
    assert classes.shape == (3, 4)
    np.savez(path, rows, np.zeros((2, 2)))
    found, classes = features.read_features(path)
    assert (found == rows).all()
    assert classes is None


def test_files_that_are_no_features(tmp_path):
    path = tmp_path / "features.npz"

    def given(*arrays, **named):
        np.savez(path, *arrays, **named)
        return lambda: features.read_features(path)

    refused(given(np.zeros(3)), path, "shape [3]", "want [N, D]")
    refused(given(features=np.zeros((2, 2)), probabilities=np.zeros((3, 2))), "probabilities", "[3, 2]")
    refused(given(np.array([["a"]])), "not an array of numbers")
    refused(given(np.array([{}])), path, "not a whole .npz of plain arrays")  # would need pickle
    refused(given(), path, "no arrays")
    refused(lambda: features.read_features(tmp_path / "none.npz"), "no such file")
    given(np.random.default_rng(0).normal(size=(50, 50)))
    for content in (path.read_bytes()[:5000], b"", b"text"):
        path.write_bytes(content)
        refused(lambda: features.read_features(path), path, "not a whole .npz")
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 2)))
    refused(lambda: features.read_features(path), path, "not a whole .npz")


# -- measure -----------------------------------------------------------------------------------------------------------


def pairs(x):
    """Of images [N, 1, 8, 8]: 8 features, 2 probabilities."""
    p = x.double().mean((1, 2, 3)) / 255
    return x.double().mean((1, 2)).numpy(), torch.stack([p, 1 - p], 1).numpy()


PAIRS = features.Network("pairs", "0" * 64, "none", 700, pairs)


@pytest.mark.parametrize("batch_size", [None, 1, 7, 5000])
def test_measure_is_the_whole_at_once(batch_size):
    digits = data.load("digits", (8, 8), 1)
    x = digits.batch(range(len(digits)))
    rows, classes = pairs(x)
    for images in (x, digits):
        found = features.measure(
            PAIRS, images, keep_features=True, keep_probabilities=True, batch_size=batch_size, progress=False
        )
        assert (found.features == rows).all()
        assert (found.probabilities == classes).all()
        assert found.moments.count == 1500
        np.testing.assert_allclose(found.moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.moments.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)


def test_measure_keeps_only_what_is_asked_for(capsys):
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    found = features.measure(PAIRS, x)
    assert found.features is found.probabilities is None
    assert "3/3" in capsys.readouterr().err
    refused(lambda: features.measure(PAIRS, x[:0]), "0 images")
    silent = replace(PAIRS, function=lambda x: (pairs(x)[0], None))
    refused(
        lambda: features.measure(silent, x, keep_probabilities=True, progress=False), "pairs: gives no probabilities"
    )


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Statistics of digits on disk; path, moments, provenance."""
    digits = data.load("digits", (8, 8), 1)
    found = features.measure(PAIRS, digits, progress=False).moments
    about = features.provenance(digits, PAIRS)
    path = tmp_path / "new/statistics.npz"
    features.save_statistics(path, found, about)
    return path, found, about


def test_statistics_come_back_with_their_provenance(saved):
    path, found, about = saved
    back = features.load_statistics(path, about.comparable())
    assert back.provenance == about
    assert (back.moments.count, back.provenance.count) == (1500, 1500)
    assert (back.moments.mean == found.mean).all()
    assert (back.moments.covariance == found.covariance).all()
    assert (about.source, about.split, about.size, about.dtype) == ("digits", "train", "8x8x1", "uint8")
    assert len(about.fingerprint) == 64
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path) as file:  # as pytorch-fid does
        assert file["mu"].shape == (8,)
        assert file["sigma"].shape == (8, 8)


@pytest.mark.parametrize("field", ["network", "weights", "resize", "size", "dtype"])
def test_statistics_of_something_else_are_refused(saved, field):
    path, _, about = saved
    expected = {**about.comparable(), field: "another"}
    refused(lambda: features.load_statistics(path, expected), path, f"{field} is {getattr(about, field)},", "another")


def test_other_fields_can_be_asked_for(saved):
    refused(lambda: features.load_statistics(saved[0], {"split": "test"}), "split is train", "test")
    assert features.load_statistics(saved[0]).provenance == saved[2]


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "cov")])
def test_plain_statistics_are_read_with_a_warning(tmp_path, names):
    path = tmp_path / "plain.npz"
    np.savez(path, **{names[0]: np.ones(2, np.float32), names[1]: np.eye(2)})
    with pytest.warns(UserWarning, match=r"plain\.npz: provenance unknown"):
        found = features.load_statistics(path, {"network": "inception-2015-12-05"})
    assert found.provenance is None
    assert found.moments.count is None
    assert frechet_distance(found.moments, Moments(5, np.zeros(2), np.eye(2))) == pytest.approx(2)


def test_files_that_are_no_statistics(saved, tmp_path):
    path = tmp_path / "statistics.npz"

    def given(**arrays):
        np.savez(path, **arrays)
        return lambda: features.load_statistics(path)

    with np.load(saved[0]) as file:
        arrays = dict(file)
    refused(given(features=np.zeros((2, 2))), "has features", "mu and sigma")
    refused(given(**{**arrays, "sigma": np.eye(7)}), "mu [8] and sigma [7, 7]")
    refused(given(**{**arrays, "mu": np.full(8, np.nan)}), "not of finite floats")
    refused(given(**{**arrays, "mu": np.array(list("abcdefgh"))}), "not of finite floats")
    for said in ("{", "{}", "[]", json.dumps({"source": "digits"})):
        refused(given(**{**arrays, "provenance": np.array(said)}), "damaged provenance")
    refused(given(**{**arrays, "mu": np.array([None] * 8)}), "not a whole .npz")
    path.write_bytes(saved[0].read_bytes()[:-100])
    refused(lambda: features.load_statistics(path), path, "not a whole .npz")


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    path, found, about = saved
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        features.save_statistics(path, found, about)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


# -- all together ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "tools/cifar_quality.py").is_file(), reason="no ../shared/tools")
@pytest.mark.filterwarnings("ignore:.*provenance unknown", "ignore:Matrix is singular")
def test_cifar_quality_as_a_feature_network():
    """Its own numbers come out: FRD by sqrtm against its own statistics, and the score of its classifier."""
    network = features.custom(f"{SHARED}/tools/cifar_quality.py:describe")
    x = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features.measure(network, x, keep_features=True, keep_probabilities=True, progress=False)
    reference = features.load_statistics(SHARED / "tools/cifar10_resnet56_train_stats.npz").moments
    import ddpm_user_cifar_quality as tool

    frd = tool.frechet(
        found.features.mean(0), np.cov(found.features, rowvar=False), reference.mean, reference.covariance
    )
    assert frechet_distance(found.moments, reference) == pytest.approx(frd, rel=1e-6)
    assert metrics.inception_score(found.probabilities, 1)[0] == pytest.approx(
        tool.score(found.probabilities), rel=1e-6
    )
    assert frechet_distance(found.moments, moments(found.features)) == pytest.approx(0, abs=1e-9)
