"""How close a solver's images are to the solution of the ODE, and how many network evaluations that takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
import torch

from csm.generators import Generator
from csm.generators.conditioning import mix_embeddings
from csm.noise import initial_noise
from csm.sampling import SamplerConfig, evaluations, solve, within

# Written out, because the defaults of SamplerConfig are what this is to choose.
REFERENCE = SamplerConfig(solver="heun", spacing="karras", steps=256, sigma_min=0.002, sigma_max=80.0, rho=7.0)
TARGET = replace(REFERENCE, steps=20)  # the paper's

Mixer = Callable[[SamplerConfig], torch.Tensor]  # settings -> images float32 (N, C, H, W), the same rows every time


@dataclass(frozen=True)
class Fidelity:
    """Images of ``generator`` by ``sampler`` against those by ``REFERENCE``.

    Attributes:
        evaluations: of the network, for one image.
        rms, mean_abs: distance over all pixels, in 8-bit levels.
        excess: the larger of both, each as a share of what it is for ``TARGET``; at most 1: as close as that.
    """

    generator: str
    sampler: SamplerConfig
    evaluations: int
    rms: float
    mean_abs: float
    excess: float


def mixer(plan: pl.DataFrame, generator: Generator, batch_size: int = 128) -> Mixer:
    """What mixes the rows of ``plan``, with conditions mixed linearly; pixels are clipped to [-1, 1] and not rounded."""

    def mixed(sampler: SamplerConfig) -> torch.Tensor:
        return torch.cat([_images(rows, generator, sampler) for rows in plan.iter_slices(batch_size)])

    return mixed


def compare_solvers(
    mixers: Mapping[str, Mixer],
    samplers: Sequence[SamplerConfig],
    counts: Sequence[int],
    on_sampler: Callable[[SamplerConfig], None] | None = None,
) -> list[Fidelity]:
    """Measure every sampler at rising numbers of evaluations, until the images of every generator are as close as ``TARGET``'s.

    Args:
        mixers: of every generator, by its name.
        samplers: settings, whose ``steps`` is replaced.
        counts: numbers of evaluations, rising; a solver that cannot make one takes fewer.
        on_sampler: called with each of ``samplers`` when it is through.

    Returns:
        The results, those of ``TARGET`` first.
    """
    references = {name: mixed(REFERENCE) for name, mixed in mixers.items()}
    targets = {name: distance(mixed(TARGET), references[name]) for name, mixed in mixers.items()}
    results = [Fidelity(name, TARGET, evaluations(TARGET), *targets[name], 1.0) for name in mixers]
    for sampler in samplers:
        for steps in dict.fromkeys(affordable_steps(sampler, count) for count in counts):
            chosen = replace(sampler, steps=steps)
            if chosen == TARGET:  # it was the first, and is as close as itself
                break
            measured = []
            for name, mixed in mixers.items():
                rms, mean_abs = distance(mixed(chosen), references[name])
                excess = max(rms / targets[name][0], mean_abs / targets[name][1])
                measured.append(Fidelity(name, chosen, evaluations(chosen), rms, mean_abs, excess))
            results += measured
            if all(result.excess <= 1 for result in measured):
                break
        if on_sampler:
            on_sampler(sampler)
    return results


def fewest(results: Sequence[Fidelity]) -> list[Fidelity]:
    """The results of the sampler that is as close as ``TARGET`` on every generator with the fewest evaluations.

    Of several with as few, the one whose worst ``excess`` is least. Empty if no sampler is as close.
    """
    names = {result.generator for result in results}
    groups: dict[str, list[Fidelity]] = {}
    for result in results:
        groups.setdefault(repr(result.sampler), []).append(result)
    close = [group for group in groups.values() if len(group) == len(names) and all(result.excess <= 1 for result in group)]
    return min(close, key=lambda group: (group[0].evaluations, max(result.excess for result in group)), default=[])


def affordable_steps(sampler: SamplerConfig, count: int) -> int:
    """Steps that cost at most ``count`` evaluations."""
    return (count + 1) // 2 if sampler.solver == "heun" else count


def distance(images: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Root mean square and mean absolute difference of two batches of images in [-1, 1], in 8-bit levels."""
    levels = (images.double() - reference.double()) * 127.5
    return levels.square().mean().sqrt().item(), levels.abs().mean().item()


def _images(rows: pl.DataFrame, generator: Generator, sampler: SamplerConfig) -> torch.Tensor:
    device = generator.device
    class_a, class_b = (
        generator.embed(torch.tensor(rows[name].to_list(), dtype=torch.int64, device=device)) for name in ("class_a", "class_b")
    )
    condition = mix_embeddings(class_a, class_b, torch.tensor(rows["lam"].to_list(), dtype=torch.float32, device=device))
    noise = initial_noise(rows["seed"].to_list(), generator.noise_shape).to(device)
    images = solve(lambda x, sigma: generator.denoise(x, sigma, condition), noise, within(sampler, generator.sigma_range))
    return generator.decode(images).clamp(-1, 1).cpu()
