from pathlib import Path

import pytest
import torch

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.errors import InputError
from csm.reannotation.teacher import Teacher, fit_teacher, load_teacher


def member(seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.5,), (0.2,)))
        torch.nn.init.normal_(classifier.network.head.weight, std=3.0)
        return classifier.eval()


def images(rows: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 1, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("members", [1, 3])
def test_the_posterior_is_the_mean_of_the_members(members: int) -> None:
    classifiers = [member(seed) for seed in range(members)]
    found = Teacher(classifiers).log_posterior(images())
    with torch.no_grad():
        probs = [classifier(images()).double().softmax(dim=1) for classifier in classifiers]
    expected = sum(probs) / members
    assert torch.allclose(found.double(), expected.log(), atol=1e-5)
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(6), atol=1e-5)
    if members > 1:
        assert (probs[0] - probs[1]).abs().max() > 0.01


def test_members_that_are_certain_of_different_classes_share_the_mass() -> None:
    def certain(label: int) -> Classifier:
        classifier = member(0)
        torch.nn.init.zeros_(classifier.network.head.weight)
        with torch.no_grad():
            classifier.network.head.bias.copy_(torch.eye(3)[label] * 500)
        return classifier

    posterior = Teacher([certain(0), certain(1)]).log_posterior(images()).exp()
    assert torch.allclose(posterior, torch.tensor([0.5, 0.5, 0.0]).expand(6, 3), atol=1e-6)


def test_the_share_is_the_posterior_of_the_pair() -> None:
    teacher = Teacher([member(0), member(1)])
    class_a, class_b = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([1, 2, 2, 1, 2, 2])
    share, posterior = teacher(images(), class_a, class_b)
    assert posterior is not None
    probs = posterior.double().exp()
    for row in range(6):
        a, b = probs[row, class_a[row]], probs[row, class_b[row]]
        assert share[row].item() == pytest.approx((a / (a + b)).item(), rel=1e-5)


def test_a_teacher_is_loaded_from_its_members(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        member(seed).save(folder)
    expected = Teacher([member(0), member(1)]).log_posterior(images())
    labels = torch.zeros(6, dtype=torch.int64)
    for teacher in (load_teacher(tmp_path / "own", folders), fit_teacher(tmp_path / "own", folders, images(), labels, 3)):
        assert torch.equal(teacher.log_posterior(images()), expected)


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/model.json does not exist"):
        load_teacher(tmp_path, [tmp_path / "absent"])
