"""Should mixtures that lie far from the data be left out? Distance by Gaussians of the training images, and by what the labels say.

python docs/experiments/distance.py WORKSPACE
"""

import torch
from common import Experiment

SHARE = 0.95  # of the variance that the principal components keep

run = Experiment(__doc__)
mixed = run.mixed()
pixels, labels = run.train[0].flatten(1).double(), run.train[1]
_, variances, axes = torch.linalg.svd(pixels - pixels.mean(dim=0), full_matrices=False)
kept = int((variances.square().cumsum(0) < SHARE * variances.square().sum()).sum()) + 1


def distance(images: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distance (N,) to the mean of the nearest class, by a covariance that the classes share, on principal components."""
    project = axes[:kept].T
    points, own = images.flatten(1).double() @ project, pixels @ project
    means = torch.stack([own[labels == label].mean(dim=0) for label in range(run.n_classes)])
    whiten = torch.linalg.cholesky(torch.linalg.inv(torch.cov((own - means[labels]).T)))
    return torch.cdist(points @ whiten, means @ whiten).amin(dim=1)


far = distance(mixed.images)
quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
for name, values in {
    "mixtures": far,
    "training images": distance(run.train[0]),
    "validation images": distance(run.val[0]),
}.items():
    print(f"distance of {name}: 5 %, 50 % and 95 % lie below", ", ".join(f"{value:.2f}" for value in values.quantile(quantiles)))

place = mixed.rows.flatten()
pairs = torch.stack([mixed.class_a, mixed.class_b], dim=1).repeat_interleave(mixed.rows.shape[1], dim=0)
of_pair = torch.empty(len(place))
of_pair[place] = mixed.labels[place].gather(1, pairs).sum(dim=1)
chance = torch.rand(len(far), generator=torch.Generator().manual_seed(0))

run.head()
run.row("all mixtures", mixed.images, mixed.labels)
for share in (0.75, 0.5):
    nearest = far.argsort()[: int(share * len(far))]
    run.row(f"the nearest {share:.0%}", mixed.images[nearest], mixed.labels[nearest])
half = len(far) // 2
for name, order in {
    "the farthest 50%": far.argsort(descending=True),
    "50% by chance": chance.argsort(),
    "the 50% whose labels say most of their pair": of_pair.argsort(descending=True),
}.items():
    run.row(name, mixed.images[order[:half]], mixed.labels[order[:half]])
