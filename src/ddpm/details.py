"""Where U-Nets of other packages differ from the paper's. This module loads no torch."""

from dataclasses import dataclass, fields
from typing import Any

from ddpm.errors import InputError, finite_number, whole_number


@dataclass(frozen=True)
class Details:
    """Details of a U-Net. The defaults are the paper's network, and other values are those of imported models.

    norm_groups       groups of every norm; 0: 32, or fewer so that each has 4 channels at the first level
    norm_eps          epsilon of every norm
    heads             attention heads
    head_channels     channels of each head, in place of `heads`; 0: the channels divided by `heads`
    middle_attention  whether there is attention between the two middle blocks
    scale_shift       the time embedding scales and shifts the second norm of a block; by default it is added before it
    even_padding      pad all four sides before a convolution of stride 2; by default the right and the bottom only
    frequency_shift   s in the frequencies of the time embedding, 1e4^(-i / (n - s)) for i = 0..n-1
    timestep_scale    the timestep is multiplied by it

    Raises InputError for a value that cannot be used.

    >>> Details(heads=4).heads
    4
    >>> Details(heads=0)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: heads 0: want a whole number of at least 1
    """

    norm_groups: int = 0
    norm_eps: float = 1e-6
    heads: int = 1
    head_channels: int = 0
    middle_attention: bool = True
    scale_shift: bool = False
    even_padding: bool = False
    frequency_shift: float = 1.0
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float | None]] = {
            "norm_groups": (0, None), "norm_eps": (0, 1), "heads": (1, None), "head_channels": (0, None),
            "frequency_shift": (0, 1), "timestep_scale": (1e-6, 1e6),
        }  # fmt: skip
        for f in fields(self):
            value: Any = getattr(self, f.name)
            if isinstance(f.default, bool):
                if not isinstance(value, bool):
                    raise InputError(f"{f.name} {value!r}: want true or false")
            else:
                check = whole_number if isinstance(f.default, int) else finite_number
                object.__setattr__(self, f.name, check(f.name, value, *limits[f.name]))
        if self.heads > 1 and self.head_channels:
            raise InputError(f"head_channels {self.head_channels}: not together with heads {self.heads}; want one")

    def heads_of(self, channels: int) -> int:
        """The number of attention heads of a layer. Raises InputError if they do not divide its channels.

        >>> Details(head_channels=8).heads_of(64)
        8
        """
        name = "head_channels" if self.head_channels else "heads"
        if channels % getattr(self, name):
            raise InputError(f"{name} {getattr(self, name)}: want a divisor of {channels}, the channels with attention")
        return channels // self.head_channels if self.head_channels else self.heads
