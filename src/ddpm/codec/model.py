"""A calibrated model as the codec uses it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ddpm import kernels
from ddpm.codec.plan import Tables
from ddpm.codec.progressive import Predictor
from ddpm.denoiser import Denoiser


@dataclass(frozen=True)
class Model:
    """A denoiser and its codec's tables, as `ddpm.load_codec` opens them.

    denoiser  for the local profile, in the network's own precision
    exact     the same denoiser with its network in float64, for the portable profile
    shape     [C, H, W] of the training images; larger pictures are cut into tiles of this shape
    tables    the tables of pictures for each K
    identity  4 bytes of a hash of tensors and tables, which every file carries
    chain     the tables of archives
    factor    the network takes heights and widths that are multiples of it
    where     2 bytes that name machine, device and release, for the local profile
    batches   whether the denoiser's x0^ is the same in any batch, to the bit
    packed    the weights in the layout that our kernels read, filled on the first use
    tick      called with a number of tiles whenever the network has seen them, for progress bars
    """

    denoiser: Denoiser
    exact: Denoiser
    shape: tuple[int, int, int]
    tables: Mapping[int, Tables]
    identity: bytes
    chain: Tables | None = None
    factor: int = 1
    where: bytes = b"\0\0"
    batches: bool = False
    packed: kernels.Packed = field(default_factory=dict, repr=False)
    tick: Callable[[int], object] = lambda tiles: None

    def predictor(self, local: bool, check: bool = False) -> Predictor:
        """The function that gives x0^ in this profile."""
        return Predictor(self.denoiser if local else self.exact, not local, check, self.packed, self.tick)
