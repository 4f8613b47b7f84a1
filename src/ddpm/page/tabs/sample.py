"""The tab Sample: images come out of noise while one watches."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from ddpm import catalog, kernels, pixels
from ddpm.files import animation, arrays, images
from ddpm.files.images import Pixels
from ddpm.noise import per_image
from ddpm.page.state import State, field, optional, png_url
from ddpm.page.work import Job
from ddpm.run.device import use_cuda_graphs
from ddpm.run.export import grid_columns
from ddpm.run.sample import GUIDANCE, Conditions, cycled_labels, sampler_levels, sampler_of, trajectory
from ddpm.samplers import named

FRAMES = 30
"""Pictures of a trajectory that are sent at most."""
MOST = 64
"""Images at a time."""


def routes(state: State) -> list[Route]:
    def choices(request: Request) -> Response:
        model = state.model(request.query_params.get("model", ""))
        preset, only = model.preset, sampler_of(model.preset) == "consistency"
        samplers = {
            name: [entry.meaning, entry.settings.get("steps", 20)]
            for name, entry in catalog.samplers().items()
            if (name == "consistency") == only
        }
        spacings = {name: entry.meaning for name, entry in catalog.spacings().items()}
        about = {"classes": preset.class_names, "always_labelled": preset.always_labelled, "shape": preset.shape}
        about |= {"samplers": samplers, "spacings": spacings, "T": model.denoiser.schedule.T}
        about["guided"] = preset.label_dropout > 0 and not only
        about["guides"] = [] if only else [name for name in state.names() if name != request.query_params["model"]]
        return JSONResponse(about)

    return [
        Route("/api/sample/choices", choices),
        state.work.route("/api/sample/start", lambda body: start(state, body)),
    ]


def start(state: State, body: dict[str, Any]) -> Job:
    """Sample as `ddpm sample` does, and send x_t and x0^ at FRAMES levels at most, evenly spread, with the last.

    A frame is all images side by side. The frame of level t shows x_t and the estimate that the network makes of it.
    """
    name = field(body, "model", str)
    seed, count = field(body, "seed", int, 0, 0, 2**62), field(body, "count", int, 4, 1, MOST)
    steps, spacing = optional(body, "steps", int, 1), optional(body, "spacing", str)
    guidance, guide = optional(body, "guidance", float), optional(body, "guide", str)
    classes = tuple(map(str, field(body, "classes", list, [])))
    model = state.model(name)
    sampler = field(body, "sampler", str, sampler_of(model.preset))
    conditions = Conditions(classes, guidance)
    if guide is not None:
        scale = GUIDANCE if guidance is None else guidance
        conditions = Conditions(classes, guide=state.model(guide), guide_scale=scale)
    conditions = conditions.resolved(model)
    denoiser, labels = conditions.apply(model)
    levels, row = sampler_levels(model, sampler, steps, spacing), named(sampler)
    seeds, y = range(seed, seed + count), cycled_labels(labels, range(count))
    view, columns = arrays.view_of(model.preset, denoiser.values), grid_columns(len(labels))

    def sheet(signal: Tensor) -> Pixels:
        return arrays.sheet(pixels.to_pixels(signal, denoiser.values).cpu(), view)

    shown = {round((len(levels) - 1) * i / (FRAMES - 2)) for i in range(FRAMES - 1)} if len(levels) >= FRAMES else None
    T, frames = denoiser.schedule.T, []
    command = command_line(name, count, seed, classes, guidance, guide, sampler, steps, spacing)
    yield {"kind": "about", "levels": levels, "command": command, "count": count, "calls": row.calls(denoiser, levels)}
    with kernels.frozen():
        x, t = per_image(seeds, model.preset.shape, state.device)(T), T
        path = trajectory(
            use_cuda_graphs(denoiser, state.device), model.preset.shape, seeds, row, levels, state.device, y
        )
        for i, step in enumerate(path):
            if shown is None or i in shown:
                frames.append(sheet(x))
                yield frame(t, i, len(levels), frames[-1], sheet(step.x0))
            else:
                yield None
            x, t = step.x, step.t
    frames.append(sheet(x))
    yield frame(0, len(levels), len(levels), frames[-1], frames[-1])
    png, gif = files(pixels.to_pixels(x, denoiser.values).cpu(), frames, columns)
    yield {"kind": "done", "png": state.keep_file(png, "image/png"), "gif": state.keep_file(gif, "image/gif")}


def frame(t: int, index: int, of: int, x: Pixels, x0: Pixels) -> dict[str, Any]:
    """The event of one level: x_t and x0^, each all images side by side."""
    urls = {name: png_url(images.grid(p, len(p), padding=0, minimum_tile=1)) for name, p in (("x", x), ("x0", x0))}
    return {"kind": "step", "t": t, "index": index, "of": of, **urls}


def files(samples: Tensor, frames: Sequence[Pixels], columns: int | None) -> tuple[bytes, bytes]:
    """The PNG file that `ddpm sample` writes of these samples [N, C, H, W], and a GIF file of the frames."""
    with tempfile.TemporaryDirectory() as folder:
        png, gif = Path(folder) / "samples.png", Path(folder) / "samples.gif"
        images.save_many(png, images.channels_last(samples), columns=columns, shown=frames[-1])
        animation.save(gif, frames, columns)
        return png.read_bytes(), gif.read_bytes()


def command_line(
    name: str, count: int, seed: int, classes: Sequence[str], guidance: float | None, guide: str | None, sampler: str,
    steps: int | None, spacing: str | None,
) -> str:  # fmt: skip
    """The words that make the same images on the command line."""
    words = ["ddpm", "sample", name, "-n", str(count), "--seed", str(seed)]
    words += ["--class", *classes] if classes else []
    options = {"guidance" if guide is None else "guide-scale": guidance, "guide": guide}
    options |= {"sampler": sampler, "steps": steps, "spacing": spacing}
    words += [w for option, value in options.items() if value is not None for w in (f"--{option}", str(value))]
    return shlex.join([*words, "--out", "samples.png"])
