"""The network: parameter counts, equality with the published architecture, initialisation, sizes, memory, precision."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from exact import one_thread  # noqa: F401
from torch import nn

from ddpm import kernels
from ddpm.errors import InputError
from ddpm.presets import PRESETS, build
from ddpm.unet import ResidualBlock, UNet, groups_of, time_embedding

COUNTS = {"cifar10": 35_746_307, "celebahq256": 113_673_219, "lsun_bedroom_large": 255_677_955}


def small(**settings):
    torch.manual_seed(0)
    return UNet(**{"channels": 3, "width": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, **settings})


def randomised(net):
    """The network with random parameters, also in place of those that start at 0 or near it. Signals stay O(1)."""
    g = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        draw = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            p.data = draw / p[0].numel() ** 0.5
        else:
            p.data = 0.2 * draw + float("norm" in name and name.endswith("weight"))
    return net


def inputs(batch, channels, *size):
    """Images and the timesteps 999, 0, 3, 500."""
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([999, 0, 3, 500])[:batch]


# The published architecture.


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """They are those of the paper's networks."""
    with torch.device("meta"):
        network = build(PRESETS[name]).network
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name]


def test_the_fast_network_is_small():
    """In bfloat16 its weights take at most 8 MB."""
    with torch.device("meta"):
        network = build(PRESETS["cifar10_fast"]).network
    assert 2 * sum(p.numel() for p in network.parameters()) <= 8e6


def test_parameter_count_of_learned_variance():
    """A learned variance doubles the output channels: 35,749,766."""
    preset = replace(PRESETS["cifar10"], variance="learned", loss="vlb")
    with torch.device("meta"):
        network = build(preset).network
    assert sum(p.numel() for p in network.parameters()) == 35_749_766


# Our names -> the names in diffusers' UNet2DModel, which the published google/ddpm-* weights have.
BLOCK = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
BLOCK["shortcut"] = "conv_shortcut"
WHOLE = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
WHOLE |= {"time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2"}


def place(part, index, blocks):
    """The place of layer `index` of down, middle or up in UNet2DModel: (prefix, number within it)."""
    if part == "middle":
        return "mid_block", index
    each = blocks + (1 if part == "down" else 2)  # layers per level, the last one resamples
    level, number = divmod(index, each)
    return f"{part}_blocks.{level}", number


def their_state(ours, blocks):
    """Our state dict with the names of UNet2DModel, where the convolution for q, k, v is three dense layers."""
    theirs = {}
    for key, value in ours.items():
        *path, leaf = key.split(".")
        if path[0] in WHOLE:
            theirs[f"{WHOLE[path[0]]}.{leaf}"] = value
            continue
        prefix, number = place(path[0], int(path[1]), blocks)
        if path[2] == "conv":
            sampler = "downsamplers" if path[0] == "down" else "upsamplers"
            theirs[f"{prefix}.{sampler}.0.conv.{leaf}"] = value
        elif path[2] == "block":
            theirs[f"{prefix}.resnets.{number}.{BLOCK[path[3]]}.{leaf}"] = value
        elif path[3] == "norm":
            theirs[f"{prefix}.attentions.{number}.group_norm.{leaf}"] = value
        else:
            flat = value.flatten(1) if leaf == "weight" else value  # a 1x1 convolution is a matrix
            names = ["to_q", "to_k", "to_v"] if path[3] == "qkv" else ["to_out.0"]
            for name, part in zip(names, flat.chunk(len(names)), strict=True):
                theirs[f"{prefix}.attentions.{number}.{name}.{leaf}"] = part
    return theirs


def their_model(net, width, channel_multipliers, num_res_blocks, attention_levels, **changes):
    """UNet2DModel with the configuration of google/ddpm-cifar10-32 and our weights. All keys must match.

    All its norms have the same number of groups, as ours do.
    """
    with_attention = ["Attn" if level in attention_levels else "" for level in range(len(channel_multipliers))]
    settings = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(width * m for m in channel_multipliers),
        "layers_per_block": num_res_blocks,
        "down_block_types": tuple(f"{a}DownBlock2D" for a in with_attention),
        "up_block_types": tuple(f"{a}UpBlock2D" for a in reversed(with_attention)),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": groups_of(width),
        "attention_head_dim": None,
        "act_fn": "silu",
        "time_embedding_type": "positional",
    }
    with torch.device("meta"):
        model = UNet2DModel(**{**settings, **changes})
    state = their_state(net.state_dict(), num_res_blocks)
    assert len(state) == len(model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def difference(net, model, x, timestep):
    """The largest absolute difference of the two outputs, and the standard deviation of ours."""
    with torch.no_grad():
        ours, theirs = net.eval()(x, timestep), model(x, timestep).sample
    return (ours - theirs).abs().max().item(), ours.std().item()


def test_output_equals_the_published_cifar10_architecture():
    """With the configuration of google/ddpm-cifar10-32 and random weights, outputs agree to 1e-5."""
    config = {"width": 128, "channel_multipliers": (1, 2, 2, 2), "num_res_blocks": 2, "attention_levels": (1,)}
    net = randomised(UNet(3, **config))
    error, size = difference(net, their_model(net, **config), *inputs(1, 3, 32, 32))
    assert size > 0.1
    assert error < 1e-5 * max(size, 1)


SHAPE_256 = {"width": 32, "channel_multipliers": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "attention_levels": (4,)}


def test_output_equals_the_published_256_architecture():
    """Six levels, attention on the fifth, a quarter of the width; H and W differ."""
    net = randomised(UNet(3, **SHAPE_256))
    error, size = difference(net, their_model(net, **SHAPE_256), *inputs(2, 3, 64, 32))
    assert size > 0.1
    assert error < 1e-5 * max(size, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"norm_eps": 1e-3},
        {"attention_head_dim": 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_one_detail_breaks_the_equality(change):
    """Negative control: the outputs then differ by more than the tolerance."""
    config = {"width": 32, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "attention_levels": (1,)}
    net = randomised(UNet(3, **config))
    x, timestep = inputs(2, 3, 16, 16)
    assert difference(net, their_model(net, **config), x, timestep)[0] < 1e-5
    assert difference(net, their_model(net, **config, **change), x, timestep)[0] > 1e-4


def test_time_embedding():
    """It is [sin, cos] of t exp(-log(1e4) i / (half - 1)), from 1 to 1e-4 radians per level."""
    t = torch.tensor([0, 1, 999])
    e = time_embedding(t, 128)
    frequency = 1e4 ** (-torch.arange(64).double() / 63)
    expected = torch.cat([(t[:, None] * frequency).sin(), (t[:, None] * frequency).cos()], 1)
    torch.testing.assert_close(e.double(), expected, rtol=0, atol=1e-4)  # float32 angles to 999 radians


# Initialisation.


def test_initialisation():
    """Xavier-uniform by fan_avg, with gain 1e-5 for a block's second conv, attention's output and the last conv."""
    net = UNet(3, width=64, channel_multipliers=(1, 2), num_res_blocks=2, attention_levels=(1,))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.GroupNorm):
            assert (layer.num_groups, layer.eps) == (16, 1e-6)
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert (layer.bias == 0).all()
        parts = layer.weight.chunk(3) if name.endswith("qkv") else [layer.weight]
        for w in parts:
            area = w[0, 0].numel()
            bound = (6 / (area * (w.shape[0] + w.shape[1]))) ** 0.5
            if name.endswith(("conv2", "attention.out")) or name == "conv_out":
                bound *= 1e-5
            assert w.abs().max() <= bound * (1 + 1e-6), name
            assert w.abs().max() > 0.98 * bound, name
            assert w.var().item() == pytest.approx(bound**2 / 3, rel=0.15), name
    named = [n for n, _ in net.named_modules() if n.endswith(("conv2", "attention.out"))]
    assert len(named) == 2 * 2 + 2 + 2 * 3 + 2 + 1 + 3  # blocks down, middle, up; attention down, middle, up


def test_the_time_embedding_reaches_narrow_levels():
    """With groups of one channel, the second norm would remove what the time embedding adds."""
    block = randomised(ResidualBlock(32, 32, 128, 0.0, groups_of(32)))
    x, time = torch.randn(1, 32, 8, 8), torch.randn(2, 1, 128)
    with torch.no_grad():
        one, other = block(x, time[0]), block(x, time[1])
    assert (one - other).std() > 0.05 * one.std()


def test_the_output_of_an_untrained_network_is_near_0():
    """So training starts from eps^ = 0 and L_simple = 1."""
    with torch.no_grad():
        assert small()(*inputs(2, 3, 8, 8)).abs().max() < 1e-3


# Inputs.


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (2, 14)])
def test_channels_and_sizes(channels, size):
    """Images may have any number of channels and any height and width. A learned variance has 2C output channels."""
    net = small(channels=channels, out_channels=2 * channels)
    x, timestep = inputs(2, channels, *size)
    assert net(x, timestep).shape == (2, 2 * channels, *size)


def test_patches():
    """Inner levels have half the size. Without their output, the outer level is equivariant to shifts of one pixel."""
    net = randomised(small(patch=2))
    x, timestep = torch.zeros(1, 3, 24, 24), torch.tensor([500])
    x[:, :, 10:14, 10:14] = inputs(1, 3, 4, 4)[0]
    sizes = []
    for layer in net.modules():
        if isinstance(layer, ResidualBlock):
            layer.register_forward_hook(lambda _, given, out: sizes.append((*out.shape[1:],)))

    def shifted(by):
        """The difference between the output for shifted x and the shifted output, away from the borders."""
        with torch.no_grad():
            return (net(x.roll(by, 3), timestep).roll(-by, 3) - net(x, timestep))[:, :, 6:18, 6:18].abs().max()

    assert shifted(1) > 1e-2
    assert {*sizes} == {(32, 12, 12), (64, 6, 6), (32, 24, 24)}
    for p in net.up[-2].parameters():
        nn.init.zeros_(p)
    assert shifted(1) < 1e-5


def test_patches_cost_a_quarter():
    """Compare multiply-adds of 3x3 convolutions. All channels but those of the image are multiples of 32."""

    def cost(patch):
        net, sums = UNet(3, width=128, channel_multipliers=(1, 2), num_res_blocks=2, patch=patch), []
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.register_forward_hook(lambda m, _, out: sums.append(m.weight.numel() * out[0, 0].numel()))
                ends = [layer.in_channels] * (layer is not net.conv_in) + [layer.out_channels] * (
                    layer is not net.conv_out
                )
                assert all(c % 32 == 0 for c in ends)
        with torch.no_grad(), kernels.disabled():
            net(*inputs(1, 3, 32, 32))
        return sum(sums)

    assert 0.25 < cost(2) / cost(1) < 0.3


def test_the_output_depends_on_position_and_time_and_not_on_the_batch():
    """A transposed image or another timestep gives another output, and images of a batch do not mix."""
    net = randomised(small(attention_levels=(0, 1)))
    x, timestep = inputs(3, 3, 8, 12)
    with torch.no_grad():
        out = net(x, timestep)
        assert (net(x.transpose(2, 3), timestep).transpose(2, 3) - out).abs().max() > 1e-2
        assert (net(x, timestep + 1) - out).flatten(1).abs().amax(1).min() > 1e-3
        for i in range(3):
            torch.testing.assert_close(net(x[i : i + 1], timestep[i : i + 1]), out[i : i + 1], rtol=1e-4, atol=1e-5)


def test_class_labels():
    """A label changes the output. Without a label it equals that of a network without classes."""
    net = randomised(small(num_classes=10))
    plain = small()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "label.weight"})
    x, timestep = inputs(2, 3, 8, 8)
    with torch.no_grad():
        none, a, b = net(x, timestep), net(x, timestep, torch.tensor([0, 1])), net(x, timestep, torch.tensor([0, 9]))
        assert torch.equal(plain(x, timestep), none)
    assert (a - none).abs().max() > 1e-2
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    assert (a[1] - b[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((30, 32), ["30x32", "30 is not divisible by 4", "28 and 32"]),
        ((32, 33), ["32x33", "33 is not divisible by 4", "32 and 36"]),
        ((3, 8), ["3x8", "smallest is 4"]),
    ],
)
@pytest.mark.parametrize(
    "levels", [{"channel_multipliers": (1, 1, 1)}, {"channel_multipliers": (1, 1), "patch": 2}], ids=["3", "1+2"]
)
def test_size_errors_name_the_nearest_sizes(size, words, levels):
    with pytest.raises(InputError) as error:
        small(**levels)(*inputs(1, 3, *size))
    assert all(word in str(error.value) for word in words)


def test_width_must_hold_the_groups():
    with pytest.raises(InputError, match="width 48: want a multiple of 32"):
        small(width=48)


# Memory and precision.


def test_checkpointing_gives_the_same_gradients():
    """Recomputed activations have the same dropout, so outputs and gradients are identical."""
    results = []
    for checkpointing in (False, True):
        net = randomised(small(gradient_checkpointing=checkpointing, dropout=0.3, attention_levels=(1,)))
        torch.manual_seed(3)
        out = net(*inputs(2, 3, 8, 8))
        out.square().mean().backward()
        results.append([out.detach(), *[p.grad for p in net.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().max() > 0


def test_checkpointing_computes_blocks_again():
    """Each block runs once, and with checkpointing once more in the backward pass."""
    for checkpointing, times in ((False, 1), (True, 2)):
        net, runs = small(gradient_checkpointing=checkpointing), []
        for layer in net.modules():
            if isinstance(layer, ResidualBlock):
                layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        net(*inputs(1, 3, 8, 8)).mean().backward()
        assert len(runs) == times * (2 + 2 + 4)  # down, middle, up


def test_dropout_only_in_training():
    net = randomised(small(dropout=0.5))
    x, timestep = inputs(1, 3, 8, 8)
    with torch.no_grad():
        assert (net(x, timestep) - net(x, timestep)).abs().max() > 1e-3
        net.eval()
        assert torch.equal(net(x, timestep), net(x, timestep))


def test_bf16():
    """The output is float32 and near that of float32. The weights stay float32."""
    net, low = (randomised(small(attention_levels=(1,), bf16=bf16)).eval() for bf16 in (False, True))
    x, timestep = inputs(4, 3, 8, 8)
    with torch.no_grad():
        exact, out = net(x, timestep), low(x, timestep)
    assert out.dtype == torch.float32
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    error = (out - exact).std() / exact.std()
    assert 1e-4 < error < 0.03  # at least 1e-4, because it is bfloat16


def test_float64_input_is_converted_to_the_dtype_of_the_weights():
    """The likelihood passes float64, and the network computes in its own precision."""
    net = randomised(small())
    x, timestep = inputs(1, 3, 8, 8)
    assert torch.equal(net(x.double(), timestep), net(x, timestep))
    assert net.double()(x, timestep).dtype == torch.float64


@pytest.mark.parametrize("bf16", [False, True])
def test_one_timestep_for_a_batch(bf16):
    """With our kernels, a batch of 64 then gives each image to the bit as alone. The codec needs that."""
    net = randomised(small(width=128, attention_levels=(1,), bf16=bf16)).eval()
    ready = kernels.ready(net.computes)
    batch = 64 if ready else 4  # bf16 without kernels is slow
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([300])
    with torch.no_grad():
        whole = net(x, t)
        torch.testing.assert_close(whole, net(x, t.expand(batch)), rtol=0, atol=0.05 if bf16 else 1e-4)
        for i in (0, 17, 63) if ready else ():
            assert torch.equal(net(x[i : i + 1], t)[0], whole[i])
