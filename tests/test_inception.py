"""Inception against Keras where the two graphs agree, and by hand where the graph of the FID differs."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm import inception
from ddpm.inception import Inception, Mixed, resize, resize_matrix

BLOCKS = "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()  # in Keras mixed0 to mixed10


@pytest.fixture(scope="module")
def network():
    """Inception with random weights and statistics. Signals have a size of about 1 in all layers."""
    torch.manual_seed(0)
    net = Inception().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(net.fc.bias)
    return net


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def outputs(net, pixels):
    """The output of each block by name, NCHW; and features and logits."""
    by_name = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: by_name.update({name: out}))
        for name, module in net.named_children()
    ]
    by_name["features"], by_name["logits"] = net(pixels)
    for hook in hooks:
        hook.remove()
    return by_name


@pytest.fixture(scope="module")
def ours(network, pixels):
    return outputs(network, pixels)


@pytest.fixture(scope="module")
def keras_outputs(network, pixels, tmp_path_factory):
    """The outputs of Keras' InceptionV3 with the same weights. Its layers are numbered in the order of the blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend than torch")
    model = keras.applications.InceptionV3(weights=None, classes=1008, classifier_activation=None)

    def number(layer):
        last = layer.name.rsplit("_", 1)[-1]
        return int(last) if last.isdigit() else 0

    convolutions = sorted((x for x in model.layers if isinstance(x, keras.layers.Conv2D)), key=number)
    norms = sorted((x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)), key=number)
    mine = [module for module in network.modules() if isinstance(module, inception.Conv)]
    for module, convolution, norm in zip(mine, convolutions, norms, strict=True):
        convolution.set_weights([module.conv.weight.permute(2, 3, 1, 0).numpy()])
        norm.set_weights([t.numpy() for t in (module.bn.bias, module.bn.running_mean, module.bn.running_var)])
        assert norm.epsilon == module.bn.eps
    model.get_layer("predictions").set_weights([network.fc.weight.T.numpy(), np.zeros(1008, np.float32)])
    names = {f"Mixed_{block}": f"mixed{i}" for i, block in enumerate(BLOCKS)}
    names |= {"Conv2d_2b_3x3": "activation_2", "Conv2d_4a_3x3": "activation_4"}
    names |= {"features": "avg_pool", "logits": "predictions"}
    part = keras.Model(model.input, [model.get_layer(name).output for name in names.values()])
    with torch.inference_mode():
        outputs = part((pixels.permute(0, 2, 3, 1).float() - 128) / 128)
    both = {name: out.permute(0, 3, 1, 2) if out.ndim == 4 else out for name, out in zip(names, outputs, strict=True)}
    return {**both, "parameters": model.count_params()}


def difference(a, b):
    """The largest difference, relative to the standard deviation of b."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("name", ["Conv2d_2b_3x3", "Conv2d_4a_3x3", *(f"Mixed_{block}" for block in BLOCKS[:-1])])
def test_blocks_equal_those_of_keras(ours, keras_outputs, name):
    assert 0.1 < keras_outputs[name].std() < 10  # not vacuous
    assert difference(ours[name], keras_outputs[name]) < 1e-4


def test_the_last_block_differs_from_keras_in_its_pool_only(ours, keras_outputs):
    a, b = ours["Mixed_7c"], keras_outputs["Mixed_7c"]
    assert difference(a[:, :1856], b[:, :1856]) < 1e-4
    assert difference(a[:, 1856:], b[:, 1856:]) > 0.1


def test_with_an_average_pool_in_the_last_block_features_and_logits_equal_those_of_keras(
    network, pixels, keras_outputs, monkeypatch
):
    """It checks the whole network from pixels, with the global pool and the classifier without bias."""
    monkeypatch.setattr(network.Mixed_7c, "branches", network.Mixed_7b.branches)
    ours = outputs(network, pixels)
    for name in ("Mixed_7c", "features", "logits"):
        assert difference(ours[name], keras_outputs[name]) < 1e-4


def test_an_average_pool_that_counts_padding_gives_other_outputs(network, ours, monkeypatch):
    """Negative control: this is torchvision's average pool."""
    counting = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
    block = network.Mixed_7b
    monkeypatch.setattr(block, "branches", [*block.branches[:-1], [counting, *block.branches[-1][1:]]])
    result = block(ours["Mixed_7a"])
    assert difference(result, ours["Mixed_7b"]) > 0.05
    assert difference(result[..., 1:-1, 1:-1], ours["Mixed_7b"][..., 1:-1, 1:-1]) < 1e-5  # only the edges differ


def test_number_of_parameters(network, keras_outputs):
    """Keras' published 23,851,784 for 1000 classes counts the statistics of 17,216 channels but has no scales."""
    count = sum(p.numel() for p in network.parameters())
    assert count == 23_851_784 - 2 * 17_216 + 17_216 + 8 * 2049
    assert keras_outputs["parameters"] == 23_851_784 + 8 * 2049
    assert sum(b.numel() for n, b in network.named_buffers() if "running_mean" in n) == 17_216


def test_shapes(ours):
    """They equal those in the listing of the graph."""
    sides = {"Conv2d_1a_3x3": (32, 149), "Conv2d_2a_3x3": (32, 147), "Conv2d_2b_3x3": (64, 147)}
    sides |= {"Conv2d_3b_1x1": (80, 73), "Conv2d_4a_3x3": (192, 71), "Mixed_5b": (256, 35), "Mixed_5c": (288, 35)}
    sides |= {"Mixed_5d": (288, 35)} | {f"Mixed_6{x}": (768, 17) for x in "abcde"} | {"Mixed_7a": (1280, 8)}
    sides |= {"Mixed_7b": (2048, 8), "Mixed_7c": (2048, 8)}
    assert {name: (out.shape[1], out.shape[2]) for name, out in ours.items() if out.ndim == 4} == sides
    assert ours["features"].shape == (1, 2048)
    assert ours["logits"].shape == (1, 1008)


def test_pools_by_hand():
    x = torch.arange(9.0).view(1, 1, 3, 3) - 10  # all negative, so a zero of the padding would be the maximum
    average = inception._average(x)[0, 0] + 10
    assert average.tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]  # a corner is the mean of four
    assert (inception._maximum(x)[0, 0] + 10).tolist() == [[4, 5, 5], [7, 8, 8], [7, 8, 8]]
    assert (inception._halve(x)[0, 0] + 10).tolist() == [[8]]


def test_the_last_blocks_pool_branch_by_hand(network, ours):
    """It is the maximum over each 3x3 neighbourhood, by loops, and then the 1x1 convolution as a matrix product."""
    x = ours["Mixed_7b"][0]
    pooled = torch.stack(
        [x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].amax((1, 2)) for i in range(8) for j in range(8)], 1
    )
    branch = network.Mixed_7c.get_submodule("branch_pool")
    bn = branch.bn
    z = branch.conv.weight[:, :, 0, 0] @ pooled
    scale = bn.weight / (bn.running_var + 1e-3).sqrt()
    expected = (scale[:, None] * (z - bn.running_mean[:, None]) + bn.bias[:, None]).relu().view(1, 192, 8, 8)
    assert difference(ours["Mixed_7c"][:, 1856:], expected) < 1e-4


def test_logits_have_no_bias(network, ours):
    with_bias = network.fc(ours["features"])
    assert difference(ours["logits"] + network.fc.bias, with_bias) < 1e-5
    assert difference(ours["logits"], with_bias) > 0.01


# -- resize ------------------------------------------------------------------------------------------------------------


def test_resize_by_hand():
    """The example of TensorFlow 1 for its treatment of corners: 2x2 to 4x4."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    expected = [[1, 1.5, 2, 2], [2, 2.5, 3, 3], [3, 3.5, 4, 4], [3, 3.5, 4, 4]]
    assert resize(x, (4, 4))[0, 0].tolist() == expected
    assert resize(torch.tensor([[[[0.0, 30.0, 60.0, 90.0]]]]), (1, 2))[0, 0, 0].tolist() == [0, 60]  # no antialiasing
    assert resize(torch.tensor([[[[0.0, 30.0, 60.0]]]]), (1, 2))[0, 0, 0].tolist() == [0, 45]


@pytest.mark.parametrize(("size", "out"), [((32, 32), (299, 299)), ((5, 3), (4, 7)), ((400, 1), (299, 2))])
def test_resize_equals_plain_loops(size, out):
    x = np.random.default_rng(0).integers(0, 256, size)

    def along(x, n):
        """Interpolate along the rows."""
        scale = len(x) / n
        below = [int(i * scale) for i in range(n)]
        above = [min(b + 1, len(x) - 1) for b in below]
        return np.stack(
            [x[b] + (i * scale - b) * (x[a] - x[b]) for i, (b, a) in enumerate(zip(below, above, strict=True))]
        )

    expected = along(along(x.astype(float), out[0]).T, out[1]).T
    np.testing.assert_allclose(resize(torch.from_numpy(x)[None, None], out)[0, 0].numpy(), expected, atol=1e-9)


def test_resize_with_half_pixel_centres_differs():
    """Negative control: torch's default has half-pixel centres and differs by several grey levels."""
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 255
    today = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert (resize(x) - today).abs().mean() > 5


def test_images_of_the_right_size_do_not_change(pixels):
    assert torch.equal(resize(pixels), pixels.double())
    assert torch.equal(resize_matrix(299, 299), torch.eye(299, dtype=torch.float64))


def test_scaling_of_pixels(network):
    """0, 128 and 255 become -1, 0 and 127/128, as uint8 and as float."""
    seen = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    a, b = network(x)[0], network(x.float())[0]
    hook.remove()
    assert seen[0].amax((0, 2, 3)).tolist() == seen[0].amin((0, 2, 3)).tolist() == [-1, 0, 127 / 128]
    assert torch.equal(a, b)


def test_other_shapes_are_refused(network):
    with pytest.raises(ValueError, match=r"want images \[B, 3, H, W\]"):
        network(torch.zeros(1, 1, 8, 8))


def test_an_image_does_not_depend_on_the_batch(network, pixels):
    two = torch.cat([pixels, 255 - pixels])
    assert difference(network(two)[0][:1], network(pixels)[0]) < 1e-4


def test_parameters_have_the_published_names(network):
    """There are 94 convolutions with their normalisations, and the classifier. A few names are checked in full."""
    names = set(network.state_dict())
    assert len(names) == 94 * 6 + 2
    assert {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch3x3dbl_3.bn.running_var",
        "Mixed_6a.branch3x3.conv.weight",
    } < names
    assert {
        "Mixed_6e.branch7x7dbl_5.bn.weight",
        "Mixed_7a.branch7x7x3_4.bn.bias",
        "Mixed_7c.branch3x3_2b.conv.weight",
    } < names
    assert {
        "Mixed_7b.branch3x3dbl_3a.conv.weight",
        "Mixed_7b.branch_pool.bn.running_mean",
        "fc.weight",
        "fc.bias",
    } < names


def test_channels_of_blocks_add_up():
    block = Mixed(4, [[inception._Layer("a", 3)], [inception._halve]])
    assert block.channels == 3 + 4
    net = Inception()
    assert [net.get_submodule(f"Mixed_{b}").channels for b in BLOCKS] == [256, 288, 288, *[768] * 5, 1280, 2048, 2048]
