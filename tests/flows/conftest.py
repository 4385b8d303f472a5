"""Models of the real formats with random weights, as tests/csm/generators has them."""

from tests.csm.generators.conftest import dit_pipeline, stable_diffusion_pipeline, unet_pipeline
from tests.csm.generators.edm.conftest import snapshot as edm_snapshot

__all__ = ["dit_pipeline", "edm_snapshot", "stable_diffusion_pipeline", "unet_pipeline"]
