"""Files of openai/improved-diffusion and w86763777/pytorch-ddpm, and weights as trainers wrap them.

Both networks are built here from their description, as functions that make their weights as they go.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_interop import CIFAR10, SMALL, apart, assert_same, drawn, inputs, meta_state, network, random_model

import ddpm
from ddpm.cli import main
from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.files import interop
from ddpm.files.interop import export_state
from ddpm.files.interop.flat import PUBLISHED
from ddpm.files.interop.wrapping import unwrap
from ddpm.presets import build


class Theirs:
    """A U-Net as a function of `state`, which it fills at its first call."""

    def __init__(self, preset):
        self.p, self.state, self.g = preset, {}, torch.Generator().manual_seed(3)

    def weights(self, name, *shape, bias=True):
        for leaf, size in (("weight", shape), *([("bias", shape[:1])] if bias else [])):
            if f"{name}.{leaf}" not in self.state:
                self.state[f"{name}.{leaf}"] = drawn(size, f"norm.{leaf}" if len(shape) == 1 else leaf, self.g)
        return [self.state[f"{name}.{leaf}"] for leaf in (("weight", "bias") if bias else ("weight",))]

    def conv(self, name, x, c_out, kernel=3, **how):
        return F.conv2d(x, *self.weights(name, c_out, x.shape[1], kernel, kernel), padding=kernel // 2, **how)

    def dense(self, name, x, c_out):
        return F.linear(x, *self.weights(name, c_out, x.shape[1]))

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.weights(name, x.shape[1]), eps=1e-5)

    def angles(self, t):
        half = self.p.width // 2
        return t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)


class OpenAI(Theirs):
    """openai/improved-diffusion: heads one after the other in one qkv, scale and shift, cosines first."""

    heads, rescale, scale_shift = 4, 1.0, True

    def block(self, name, x, emb, c_out):
        h = self.conv(f"{name}.in_layers.2", F.silu(self.norm(f"{name}.in_layers.0", x)), c_out)
        e = self.dense(f"{name}.emb_layers.1", F.silu(emb), c_out * (2 if self.scale_shift else 1))[..., None, None]
        if self.scale_shift:
            h = self.norm(f"{name}.out_layers.0", h) * (1 + e[:, :c_out]) + e[:, c_out:]
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), c_out)
        return h + (x if x.shape[1] == c_out else self.conv(f"{name}.skip_connection", x, c_out, 1))

    def attention(self, name, x):
        B, C, H, W = x.shape
        flat = self.norm(f"{name}.norm", x).flatten(2)
        qkv = F.conv1d(flat, *self.weights(f"{name}.qkv", 3 * C, C, 1))
        out = []
        for head in qkv.chunk(self.heads, dim=1):
            q, k, v = head.chunk(3, dim=1)
            weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(C / self.heads), dim=-1)
            out.append(torch.einsum("bts,bcs->bct", weight, v))
        out = F.conv1d(torch.cat(out, 1), *self.weights(f"{name}.proj_out", C, C, 1))
        return x + out.view(B, C, H, W)

    def __call__(self, x, t, y=None):
        p, angle = self.p, self.angles(t * self.rescale)
        emb = self.dense("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1), 4 * p.width)
        emb = self.dense("time_embed.2", F.silu(emb), 4 * p.width)
        if p.class_names:
            emb = emb + F.embedding(y, *self.weights("label_emb", len(p.class_names), 4 * p.width, bias=False))
        h = self.conv("input_blocks.0.0", x, p.width)
        kept, number, bottom = [h], 1, len(p.channel_multipliers) - 1
        for level, m in enumerate(p.channel_multipliers):
            for _ in range(p.num_res_blocks):
                h = self.block(f"input_blocks.{number}.0", h, emb, p.width * m)
                if level in p.attention_levels:
                    h = self.attention(f"input_blocks.{number}.1", h)
                kept.append(h)
                number += 1
            if level < bottom:
                h = self.conv(f"input_blocks.{number}.0.op", h, h.shape[1], stride=2)
                kept.append(h)
                number += 1
        h = self.attention("middle_block.1", self.block("middle_block.0", h, emb, h.shape[1]))
        h, number = self.block("middle_block.2", h, emb, h.shape[1]), 0
        for level in range(bottom, -1, -1):
            for i in range(p.num_res_blocks + 1):
                c = p.width * p.channel_multipliers[level]
                h, place = self.block(f"output_blocks.{number}.0", torch.cat([h, kept.pop()], 1), emb, c), 1
                if level in p.attention_levels:
                    h, place = self.attention(f"output_blocks.{number}.1", h), 2
                if level > 0 and i == p.num_res_blocks:
                    h = self.conv(f"output_blocks.{number}.{place}.conv", F.interpolate(h, scale_factor=2), c)
                number += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), 2 * p.channels)


class W86763777(Theirs):
    """w86763777/pytorch-ddpm: one head, sines and cosines in turn, read from a table that the file holds."""

    def block(self, name, x, emb, c_out, attention):
        h = self.conv(f"{name}.block1.2", F.silu(self.norm(f"{name}.block1.0", x)), c_out)
        h = h + self.dense(f"{name}.temb_proj.1", F.silu(emb), c_out)[..., None, None]
        h = self.conv(f"{name}.block2.3", F.silu(self.norm(f"{name}.block2.0", h)), c_out)
        h = h + (x if x.shape[1] == c_out else self.conv(f"{name}.shortcut", x, c_out, 1))
        if not attention:
            return h
        n = self.norm(f"{name}.attn.group_norm", h)
        q, k, v = (self.conv(f"{name}.attn.proj_{part}", n, c_out, 1).flatten(2) for part in "qkv")
        weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c_out), dim=2)
        return h + self.conv(f"{name}.attn.proj", torch.einsum("bij,bcj->bci", weight, v).view_as(h), c_out, 1)

    def __call__(self, x, t):
        p, T = self.p, self.p.num_timesteps
        angle = self.angles(torch.arange(T))
        table = self.state.setdefault(
            "time_embedding.timembedding.0.weight", torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
        )
        emb = self.dense("time_embedding.timembedding.1", table[t], 4 * p.width)
        emb = self.dense("time_embedding.timembedding.3", F.silu(emb), 4 * p.width)
        h = self.conv("head", x, p.width)
        kept, number, bottom = [h], 0, len(p.channel_multipliers) - 1
        for level, m in enumerate(p.channel_multipliers):
            for _ in range(p.num_res_blocks):
                h = self.block(f"downblocks.{number}", h, emb, p.width * m, level in p.attention_levels)
                kept.append(h)
                number += 1
            if level < bottom:
                h = self.conv(f"downblocks.{number}.main", h, h.shape[1], stride=2)
                kept.append(h)
                number += 1
        h = self.block("middleblocks.0", h, emb, h.shape[1], True)
        h, number = self.block("middleblocks.1", h, emb, h.shape[1], False), 0
        for level in range(bottom, -1, -1):
            for _ in range(p.num_res_blocks + 1):
                c = p.width * p.channel_multipliers[level]
                h = self.block(f"upblocks.{number}", torch.cat([h, kept.pop()], 1), emb, c, level in p.attention_levels)
                number += 1
            if level > 0:
                h = self.conv(f"upblocks.{number}.main", F.interpolate(h, scale_factor=2), h.shape[1])
                number += 1
        return self.conv("tail.2", F.silu(self.norm("tail.0", h)), p.channels)


def filled(model, *args):
    with torch.no_grad():
        model(*args)
    return model


PAPER = replace(CIFAR10, width=128, channel_multipliers=(1, 2), num_res_blocks=1, size=(32, 32), num_timesteps=1000)
OPENAI = {
    "CIFAR-10": (PUBLISHED[0], 4, 0.25, True),
    "ImageNet": (PUBLISHED[1], 4, 0.25, True),
    "LSUN": (PUBLISHED[3], 1, 1.0, False),
}


@pytest.mark.parametrize("name", OPENAI)
def test_a_published_network_of_improved_diffusion_comes_in(name, tmp_path):
    """Its shapes tell which one it is. All its levels, narrower and on a small image, give the same output to 1e-5.

    Without heads or scaled timesteps the output is another one.
    """
    published, heads, rescale, scale_shift = OPENAI[name]
    whole = export_state(meta_state(published), published, "improved_diffusion")
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in whole.items()}, tmp_path / "whole.pt")
    assert interop.recognise(tmp_path / "whole.pt") == "improved_diffusion"
    assert interop.read(tmp_path / "whole.pt")[0] == published

    preset = replace(published, width=64, details=replace(published.details, norm_groups=32))
    model = OpenAI(preset)
    model.heads, model.rescale, model.scale_shift = heads, rescale, scale_shift
    x, timestep = inputs(preset, (64, 64) if name == "LSUN" else (16, 16), batch=1)
    filled(model, x, timestep)
    torch.save(model.state, tmp_path / "ema.pt")
    state = interop.read(tmp_path / "ema.pt", preset)[1]
    net = network(preset, state)
    assert apart(net, model, x, timestep) < 1e-5
    assert_same(export_state(state, preset, "improved_diffusion"), model.state)
    if name == "CIFAR-10":
        for change in ({"heads": 1}, {"timestep_scale": 1.0}, {"frequency_shift": 1.0}, {"even_padding": False}):
            other = replace(preset, details=replace(preset.details, **change))
            assert apart(network(other, state), model, x, timestep) > 1e-4, change
    denoiser = build(preset)  # T and the schedule are those of the README
    if published.schedule == "cosine":
        s = (torch.arange(4001).double() / 4000 + 0.008) / 1.008
        beta = 1 - (s[1:] * math.pi / 2).cos() ** 2 / (s[:-1] * math.pi / 2).cos() ** 2
        torch.testing.assert_close(denoiser.schedule.beta[1:], beta.clamp(max=0.999), rtol=1e-9, atol=0)


def test_the_network_of_improved_diffusion_with_classes_comes_in():
    """Names and shapes of ImageNet's network, and the output of a smaller one with classes."""
    theirs = export_state(meta_state(PUBLISHED[2]), PUBLISHED[2], "improved_diffusion")
    assert theirs["label_emb.weight"].shape == (1000, 768)
    assert theirs["input_blocks.5.0.emb_layers.1.weight"].shape == (768, 768)
    small = replace(
        PUBLISHED[2], width=128, channel_multipliers=(1, 2), size=(16, 16), num_res_blocks=1,
        attention_resolutions=(8,), class_names=("a", "b", "c"),
    )  # fmt: skip
    model, (x, timestep), y = OpenAI(small), inputs(small), torch.tensor([2, 0])
    filled(model, x, timestep, y)
    net = network(small, interop.import_state(model.state, small, "improved_diffusion"))
    assert apart(lambda *a: net(*a, y), lambda *a: model(*a, y), x, timestep) < 1e-5


def test_other_networks_of_improved_diffusion(tmp_path):
    """Heads, T and schedule are not in the file. In Python a preset with details says them."""
    preset = replace(PUBLISHED[0], width=64, details=replace(PUBLISHED[0].details, norm_groups=32))
    preset = replace(preset, channel_multipliers=(1, 2), num_res_blocks=1, size=(16, 16), attention_resolutions=(8,))
    model, file = OpenAI(preset), tmp_path / "model.pt"
    model.rescale = 0.25
    torch.save(filled(model, *inputs(preset)).state, file)
    with pytest.raises(InputError, match="not one of the networks that improved-diffusion published"):
        interop.read(file)
    with pytest.raises(InputError, match="preset: does not say the heads"):
        interop.read(file, replace(preset, details=Details()))
    assert apart(network(preset, interop.read(file, preset)[1]), model, *inputs(preset)) < 1e-5
    torch.save(model.state | {"input_blocks.0.0.weight": torch.zeros(64, 6, 3, 3)}, file)
    with pytest.raises(InputError, match="takes 6 channels; want 3"):
        interop.read(file)


def test_the_published_network_of_pytorch_ddpm_comes_in(tmp_path):
    """Its configuration is that of the paper's CIFAR-10; the average of its checkpoint is taken."""
    model = W86763777(CIFAR10)
    x, timestep = inputs(CIFAR10, batch=1)
    filled(model, x, timestep)
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in model.state.items()}
    torch.save({"net_model": zeros, "ema_model": model.state, "step": 5, "x_T": x}, tmp_path / "ckpt.pt")
    preset, state = interop.read(tmp_path / "ckpt.pt")
    details = Details(norm_eps=1e-5, even_padding=True, frequency_shift=0)
    assert preset == replace(CIFAR10, data="", details=details)
    assert apart(network(preset, state), model, x, timestep) < 1e-5
    assert apart(network(replace(preset, details=Details()), state), model, x, timestep) > 1e-4
    assert main(["import", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "in.safetensors")]) == 0
    assert apart(ddpm.load(tmp_path / "in.safetensors").network, model, x, timestep) < 1e-5


def test_other_networks_of_pytorch_ddpm(tmp_path):
    """A narrow one with another T; a table of other sinusoids is refused; without attention a preset says the size."""
    preset, file = replace(PAPER, width=64, num_timesteps=50, sample_steps=50), tmp_path / "ckpt.pt"
    model = W86763777(preset)
    torch.save(filled(model, inputs(preset)[0], torch.tensor([49, 3])).state, file)
    found, state = interop.read(file)
    assert (found.size, found.num_timesteps, found.details.norm_groups) == ((32, 32), 50, 32)
    assert apart(network(found, state), model, inputs(preset)[0], torch.tensor([49, 3])) < 1e-5
    assert_same(interop.read(file, replace(preset, num_timesteps=1000))[1], state)
    torch.save(model.state | {"time_embedding.timembedding.0.weight": torch.randn(50, 64)}, file)
    with pytest.raises(InputError, match=r"timembedding.0.weight: not the sinusoids"):
        interop.read(file)
    torch.save({name: value for name, value in model.state.items() if ".attn." not in name}, file)
    with pytest.raises(InputError, match="no attention on the way down"):
        interop.read(file)


def test_ddims_narrow_networks_come_in(tmp_path):
    """Its norms have 32 groups, where the rule of our presets gives fewer."""
    preset = replace(PAPER, width=64, details=Details(norm_groups=32))
    state = export_state(random_model(preset).denoiser.network.state_dict(), preset, "ddim")
    torch.save(state, tmp_path / "model.ckpt")
    found, ours = interop.read(tmp_path / "model.ckpt")
    assert (found.details, found.width) == (preset.details, 64)
    assert_same(interop.read(tmp_path / "model.ckpt", replace(preset, details=Details()))[1], ours)


# -- what trainers wrap around weights ---------------------------------------------------------------------------------

STATE = {"a.weight": torch.ones(2), "b.weight": torch.ones(1)}
RAW = {name: value * 0 for name, value in STATE.items()}


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "bare": STATE,
    "with numbers": STATE | {"epoch": 3},
    "lightning": {"state_dict": prefixed(STATE, "model."), "epoch": 3, "optimizer_states": [{0: torch.zeros(2)}]},
    "lightning with an average": {"state_dict": prefixed(RAW, "model.") | prefixed(STATE, "ema_model.")},
    "lightning with LitEma": {
        "state_dict": prefixed(RAW, "model.net.")
        | {f"model_ema.net{name.replace('.', '')}": value for name, value in STATE.items()}
        | {"model_ema.decay": torch.tensor(0.9)}
    },
    "model and ema": {"model": RAW, "ema": STATE},
    "ema inside": {"net": RAW, "extra": {"model_ema": prefixed(STATE, "module.")}},
    "compiled": prefixed(STATE, "_orig_mod."),
    "compiled and parallel": {"model": prefixed(STATE, "module._orig_mod.")},
    "compiled inside": prefixed(STATE, "net._orig_mod.unet."),
    "swa_utils": {"swa_model": prefixed(STATE, "module.") | {"n_averaged": torch.tensor(3)}, "model": RAW},
    "ema_pytorch": {"ema": prefixed(STATE, "ema_model.") | prefixed(RAW, "online_model."), "step": 1, "model": RAW},
    "a list": [prefixed(RAW, "module."), {"state": {}}, 5, 1000, STATE],
    "a list without an average": [STATE, {"state": {}}, 5, 1000],
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_in_what_trainers_save(name):
    found = unwrap(WRAPPED[name], "a.weight")
    assert_same(found, STATE)
    assert unwrap(WRAPPED[name], "c.weight") is None


def test_which_network_is_asked_where_there_are_several():
    with pytest.raises(InputError, match=r"has several networks: generator, teacher; want one"):
        unwrap({"generator": STATE, "teacher": RAW}, "a.weight")
    with pytest.raises(InputError, match=r"has several networks: ema_0.99, ema_0.999; want"):
        unwrap({"ema_0.99": STATE, "ema_0.999": RAW, "model": RAW}, "a.weight")


def test_an_average_without_names_is_told():
    with pytest.warns(UserWarning, match="ema: this average has other names, so the last weights are read"):
        found = unwrap({"model": STATE, "ema": {"shadow_params": list(RAW.values())}}, "a.weight")
    assert_same(found, STATE)


@pytest.mark.parametrize("name", ["lightning", "model and ema", "compiled"])
def test_wrapped_weights_are_those_of_the_bare_file(name, tmp_path):
    preset = replace(SMALL, width=128, size=(16, 16), attention_resolutions=(16,))
    state = export_state(random_model(preset).denoiser.network.state_dict(), preset, "ddim")
    wrapped = {"lightning": {"state_dict": state, "epoch": 3}, "compiled": prefixed(state, "_orig_mod.")}
    wrapped["model and ema"] = {"model": {k: v * 0 for k, v in state.items()}, "ema": state}
    torch.save(state, tmp_path / "bare.ckpt")
    torch.save(wrapped[name], tmp_path / "wrapped.ckpt")
    assert interop.recognise(tmp_path / "wrapped.ckpt") == "ddim"
    assert_same(interop.read(tmp_path / "wrapped.ckpt")[1], interop.read(tmp_path / "bare.ckpt")[1])
