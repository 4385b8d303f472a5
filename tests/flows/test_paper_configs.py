"""The bundled configurations with the paper's settings; their numbers are those of the paper's table."""

import math
from dataclasses import asdict

import pytest

from csm.classifiers import check_network
from csm.noise_schedules import karras_sigmas
from csm.plan_rules import count_pairs, resolve_plan
from csm.sampling import noise_levels
from flows.config import load_config

PAPER = {"cifar10": (10, 20, 159_840, 4.0), "cifar100": (100, 25, 158_400, 2.3), "tiny-imagenet": (200, 25, 318_400, 4.0)}
TRAIN = {"cifar100": 45_000, "tiny-imagenet": 90_000}


@pytest.fixture(params=PAPER)
def named(request):
    # The data are not looked at here.
    return request.param, load_config(request.param, ("data.source=digits",))


def test_about_as_many_images_as_in_the_paper(named):
    classes, _, images, _ = PAPER[named[0]]
    plan = resolve_plan(named[1].plan, classes, TRAIN.get(named[0], 45_000))
    pairs = count_pairs(plan.pairs, classes, plan.pairs_per_class)
    if named[0] == "cifar10":
        assert math.comb(classes, 2) * plan.sets * plan.ratios == images
    else:  # by the rules: fewer pairs with more sets
        assert (plan.pairs, plan.pairs_per_class) == ("confusion", {100: 7, 200: 8}[classes])
        assert images <= pairs * plan.sets * plan.ratios <= 1.2 * images
        paper = load_config(named[0], ("data.source=digits", "plan.pairs=all", f"plan.sets_per_pair={400 // classes}")).plan
        assert math.comb(classes, 2) * paper.sets * paper.ratios == images  # as the file says
    assert (plan.ratios, plan.grid) == (8, "uniform")


def test_the_sampler_is_edm_s(named):
    steps = PAPER[named[0]][1]
    sampler = named[1].mix.sampler
    assert (sampler.solver, sampler.steps, sampler.churn) == ("heun", steps, 0)
    assert noise_levels(sampler).tolist() == karras_sigmas(steps, 0.002, 80.0, 7.0).tolist()


def test_labels_are_by_projection_in_clip_s_features(named):
    config = named[1]
    term = config.train.chosen["paper"].mixed
    annotator = config.annotate.annotators[term.annotator]
    assert (annotator.head, annotator.encoder, annotator.scale) == ("projection", "clip", PAPER[named[0]][3])
    assert (term.loss, term.weight, term.schedule, term.per_real) == ("l2", 1.0, "pair", 2)
    assert config.train.chosen["cross-entropy"].mixed is None
    assert config.annotators == ("projection-clip", "auto")


def test_labels_of_csm_are_by_the_teacher_or_by_all_that_can_be_asked(named):
    annotate = named[1].annotate
    assert annotate.candidates == ("teacher", "experts")
    many = named[0] != "cifar10"  # classes
    assert annotate.annotators["experts"].members == (
        ("teacher", "linear-clip") if many else ("teacher", "shortlist", "linear-clip")
    )


def test_training_is_the_paper_s(named):
    train = named[1].train
    values = asdict(train.optimizer)
    expected = {"kind": "sgd", "epochs": 200, "batch_size": 128, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    expected |= {
        "schedule": "multi-step",
        "milestones": (80, 120),
        "decay": 0.1,
        "warmup": 0,
        "clip": 2,
        "choose": "val-accuracy",
    }
    assert {key: values[key] for key in expected} == expected
    assert list(train.chosen) == ["cross-entropy", "paper", "csm"]
    assert train.network == "resnet50"
    side = 64 if named[0] == "tiny-imagenet" else 32
    check_network(train.network, train.parameters, (side, side, 3))
    assert named[1].evaluate.bins == 15


def test_the_published_generator_is_the_one_of_cifar10(named):
    generator = named[1].generator
    published = ("edm", "edm-cifar10-32x32-cond-vp.pkl")
    assert (generator.kind, generator.path) == (published if named[0] == "cifar10" else ("auto", ""))
