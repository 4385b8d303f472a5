"""Are mixtures of three classes worth more than mixtures of two? As many images of each, from the workspace's generator.

python docs/experiments/three_classes.py WORKSPACE
"""

import torch
from common import Experiment

from csm.generators import load_generator
from csm.mixing import to_uint8
from csm.noise import initial_noise
from csm.sampling import solve, within

BATCH = 256

run = Experiment(__doc__)
mixed = run.mixed()
generator = load_generator(run.workspace.generator)
sampler = within(run.config.mix.sampler, generator.sigma_range)
conditions = generator.embed(torch.arange(run.n_classes))


def images_of(classes: int, count: int) -> torch.Tensor:
    """``count`` images, each of ``classes`` different ones with shares from a flat Dirichlet distribution, uint8 (N, C, H, W)."""
    draw = torch.Generator().manual_seed(classes)
    chosen = torch.rand(count, run.n_classes, generator=draw).argsort(dim=1)[:, :classes]
    weights = -torch.rand(count, classes, generator=draw).log()
    weights /= weights.sum(dim=1, keepdim=True)
    made = []
    for rows in torch.arange(count).split(BATCH):
        condition = (conditions[chosen[rows]] * weights[rows].view(len(rows), classes, *[1] * (conditions.dim() - 1))).sum(dim=1)
        noise = initial_noise([classes * 10**9 + int(row) for row in rows], generator.noise_shape)
        images = solve(lambda x, sigma, c=condition: generator.denoise(x, sigma, c), noise, sampler, None)
        made.append(to_uint8(generator.decode(images)))
    return torch.cat(made)


run.head()
for classes in (1, 2, 3, run.n_classes):
    images = images_of(classes, len(mixed.images))
    labels = run.labels(images)
    said = f"{torch.special.entr(labels).sum(dim=1).mean():.2f}"
    run.row(f"{classes} class{'es' * (classes > 1)} an image, labels of entropy {said}", images, labels)
run.row("the workspace's own mixtures, ratios evenly spaced", mixed.images, mixed.labels)
