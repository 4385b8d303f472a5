"""What an encoder may be made from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """Folders on storage that every node sees.

    Attributes:
        fitted: the encoder's own, for what was fitted on the training images.
        members: classifiers trained on the real images.
        generator: the diffusion model.
        truth: of a data set whose posterior is known, its generator.
    """

    fitted: Path
    members: tuple[Path, ...] = ()
    generator: Path | None = None
    truth: Path | None = None
