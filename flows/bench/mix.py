"""bench mix: images per second of this code against the original's way of working, on one device."""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import polars as pl
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cluster.shards import write_part
from csm import tables
from csm.fidelity import TARGET
from csm.generators import Generator
from csm.generators.acceleration import accelerate
from csm.generators.conditioning import mix_embeddings
from csm.mixing import mix, to_uint8
from csm.noise import initial_noise
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig, evaluations, solve
from flows.bench.trained import trained_generator
from flows.progress import say

RATIOS = 8
BATCH = {"cpu": 16, "cuda": 512}
LEVELS = 360  # images whose bfloat16 is compared with float32
MATMUL = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that measures a device's peak


def mixing_speed(workspace: Path | None = None, seconds: float = 60.0, compiled: bool = False) -> dict[str, Any]:
    """Speed of mixing with EDM's CIFAR-10 network (55.7 million random weights: speed does not depend on them), against the original's.

    The baseline is written from the description of the original: float32, Heun with 20 noise levels, one batch for each mixed set (one
    noise, eight ratios), every image written by itself as PNG. Ours: ``accelerate``, full batches across pairs and sets, a part file.
    Equal fidelity compares it with the default sampler, see ``csm bench solvers``.

    Args:
        workspace: with a trained generator, on which the difference to float32 is measured; None trains one on digits (a minute).
        seconds: about how long the baseline is timed.
        compiled: with torch.compile; its time is stated apart.

    Returns:
        device, precision, flops (of one evaluation of one image), compile_s, baseline_images_per_s, images_per_s (at equal evaluations),
        images_per_s_equal_fidelity, ratio_equal_evaluations, ratio_equal_fidelity, matmul_flops (peak measured in the same precision),
        matmul_ratio (of that to float32's: what the arithmetic alone can give), peak_share, mean_abs_levels (of 255, to float32, on the
        trained generator), evaluations, evaluations_equal_fidelity.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = SamplerConfig()
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        original = _edm().to(torch.device(device))
        flops = _flops(original)
        shape = (32, 32, 3)

        one = _timed(lambda: _original(_plan(1), original, root / "png"))  # warm-up, and how long a set takes
        sets = max(1, round(seconds / one))
        say(f"baseline: float32, Heun 20, a batch for each set, PNG files; {sets * RATIOS} images")
        baseline = sets * RATIOS / _timed(lambda: _original(_plan(sets), original, root / "png"))

        ours = accelerate(_edm(), device, compiled=compiled)
        assert ours.network is not None
        dtype = next(ours.network.parameters()).dtype
        rows = -(-2 * sets * RATIOS // BATCH[device]) * BATCH[device]  # full batches
        plan = _plan(rows // RATIOS)

        def run(sampler: SamplerConfig, rows: pl.DataFrame = plan) -> None:
            write_part(mix(rows, ours, shape, sampler, BATCH[device]), root / "parts", 0, tables.MIXED, "bench")

        first = _timed(lambda: run(SamplerConfig(solver="euler", steps=2), plan.head(BATCH[device])))
        say(f"ours: {str(dtype).removeprefix('torch.')}, batches of {BATCH[device]}, part files; {len(plan)} images")
        speed = len(plan) / _timed(lambda: run(TARGET))
        say(f"ours, default sampler: {default.solver}, {evaluations(default)} evaluations")
        fidelity = len(plan) / _timed(lambda: run(default))
        peak, single = (_matmul_flops(MATMUL[device], kind, device) for kind in (dtype, torch.float32))
        return {
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            "precision": str(dtype).removeprefix("torch."),
            "flops": flops,
            "compile_s": round(first, 1) if compiled else 0.0,
            "baseline_images_per_s": round(baseline, 4),
            "images_per_s": round(speed, 4),
            "images_per_s_equal_fidelity": round(fidelity, 4),
            "ratio_equal_evaluations": round(speed / baseline, 2),
            "ratio_equal_fidelity": round(fidelity / baseline, 2),
            "matmul_flops": round(peak),
            "matmul_ratio": round(peak / single, 2),
            "peak_share": round(speed * evaluations(TARGET) * flops / peak, 3),
            "mean_abs_levels": round(_levels(trained_generator(workspace), device), 4),
            "evaluations": evaluations(TARGET),
            "evaluations_equal_fidelity": evaluations(default),
        }


def _edm() -> Generator:
    from csm.generators.edm.generator import CIFAR10_COND_VP, EDMGenerator

    torch.manual_seed(0)
    return EDMGenerator(CIFAR10_COND_VP).eval().requires_grad_(False)


def _plan(sets: int) -> pl.DataFrame:
    """So many mixed sets, of different pairs."""
    per_pair = -(-sets // 45)
    return make_plan(10, "bench", "bench", PlanConfig(ratios=RATIOS, sets_per_pair=per_pair)).head(sets * RATIOS)


@torch.no_grad()
def _original(plan: pl.DataFrame, generator: Generator, folder: Path) -> None:
    """One batch for each set, and each image written by itself."""
    folder.mkdir(exist_ok=True)
    for rows in plan.iter_slices(RATIOS):
        labels = (torch.tensor(rows[name].to_list(), device=generator.device) for name in ("class_a", "class_b"))
        lam = torch.tensor(rows["lam"].to_list(), device=generator.device)
        condition = mix_embeddings(*(generator.embed(label) for label in labels), lam)
        noise = initial_noise(rows["seed"].to_list(), generator.noise_shape).to(generator.device)
        images = solve(lambda x, sigma, c=condition: generator.denoise(x, sigma, c), noise, TARGET)  # type: ignore[misc]
        for mix_id, pixels in zip(rows["mix_id"], to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            Image.fromarray(pixels).save(folder / f"{mix_id}.png")


def _levels(generator: Generator, device: str) -> float:
    """Mean absolute difference, in levels of 255, between the images of ``generator`` in bfloat16 and in float32."""
    plan = make_plan(generator.n_classes, "bench", "bench", PlanConfig(sets_per_pair=1)).head(LEVELS)
    channels, height, width = generator.noise_shape
    shape = (height, width, channels)
    frames = [
        mix(plan, accelerate(deepcopy(generator), device, precision), shape, TARGET) for precision in ("float32", "bfloat16")
    ]
    exact, rounded = (tables.to_images(frame["image"], shape).int() for frame in frames)
    return float((exact - rounded).abs().float().mean())


def _flops(generator: Generator) -> int:
    """Floating-point operations of one evaluation for one image; a multiplication and an addition are two."""
    device = generator.device
    x, sigma = torch.zeros(1, *generator.noise_shape, device=device), torch.ones(1, device=device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows matrix products
        generator.denoise(x, sigma, generator.embed(torch.zeros(1, dtype=torch.int64, device=device)))
    return int(counter.get_total_flops())


def _matmul_flops(size: int, dtype: torch.dtype, device: str) -> float:
    """The most of five products of square matrices, in operations a second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_timed(lambda: a @ b) for _ in range(6))


def _timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, until the device has finished it."""
    started = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started
