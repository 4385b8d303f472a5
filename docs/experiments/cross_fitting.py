"""Should a teacher label images that it was trained on? Folds of the training images, and teachers that did not see one of them.

python docs/experiments/cross_fitting.py WORKSPACE
"""

import torch
from common import Experiment, one_hot

from csm.classifiers import load_classifier
from flows.fit_teacher import members

FOLDS, PER_FOLD = 5, 2

run = Experiment(__doc__)
images, truth = run.train
fold = torch.randperm(len(images), generator=torch.Generator().manual_seed(7)) % FOLDS
seeing = [load_classifier(folder) for folder in members(run.workspace, run.config)]
blind = [[run.teacher(fold != left_out, 5000 + FOLDS * i + left_out) for i in range(PER_FOLD)] for left_out in range(FOLDS)]

own = run.calibrated(seeing, images)
crossed = torch.empty_like(own)
for left_out, teachers in enumerate(blind):
    crossed[fold == left_out] = run.calibrated(teachers, images[fold == left_out])
for name, labels in {"teachers that saw them": own, "teachers that did not": crossed}.items():
    nll = torch.nn.functional.nll_loss(labels.clamp_min(1e-12).log(), truth)
    print(f"labels of the training images by {name}: entropy {torch.special.entr(labels).sum(1).mean():.3f} nats, NLL {nll:.3f}")
between = (crossed + one_hot(truth, run.n_classes)) / 2

mixed = run.mixed()
first_of_each = [teachers[0] for teachers in blind]
run.head()
run.row("training images, labels by teachers that saw them", images, own)
run.row("training images, labels by teachers that did not", images, crossed)
run.row("training images, halfway from these to one-hot", images, between)
run.row(f"mixtures, labels by {len(seeing)} teachers", mixed.images, run.calibrated(seeing, mixed.images))
run.row(f"mixtures, labels by {FOLDS} teachers that each lack a fold", mixed.images, run.calibrated(first_of_each, mixed.images))
run.row(f"mixtures, labels by `{run.annotator}`", mixed.images, mixed.labels)
more = max(1, len(mixed.images) // len(images))  # so that half of what is drawn are training images
for name, labels in {"labels by teachers that did not see them": crossed, "halfway to one-hot": between}.items():
    together = torch.cat([mixed.images, *[images] * more]), torch.cat([mixed.labels, *[labels] * more])
    run.row(f"mixtures, and training images, {name}", *together)
