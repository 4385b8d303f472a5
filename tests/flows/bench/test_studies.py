import pytest

from csm.errors import InputError
from flows.bench.studies import Study, arms, choose_studies, parse_study, place_config, read_studies, study_names

WEIGHT = Study("?", "!", ("digits-hard",), {"heavy": {"method.mixed.weight": 32}, "pixel": {"like": "csm-pixel"}})
MEMBERS = Study(
    "?", "!", ("digits-hard", "gaussians"),
    {
        "one": {"annotate.members": 1, "method.mixed.annotator": "moved"},
        "same": {"method.mixed.annotator": "moved"},
        "round": {"annotate.teacher.models": ["{base}/runs/csm-seed*"]},
    },
    annotators={"moved": {"head": "posterior", "encoder": "views"}},
    encoders={"views": {"kind": "teacher", "parameters": {"views": 5}}},
)  # fmt: skip
STUDIES = {"weight": WEIGHT, "members": MEMBERS}


@pytest.mark.parametrize("name", study_names())
def test_every_bundled_study_fits_its_configurations(name):
    studies = read_studies()
    study = studies[name]
    assert study.question.endswith("?")
    assert study.hope
    for arm in arms(name, study):
        config = place_config(arm.place, {name: study}, studies, "/base", 3)
        assert arm.run in config.train.chosen
        assert config.train.seeds == 3
        assert config.evaluate.shifts == {}


def test_methods_that_need_the_same_images_and_labels_share_a_workspace():
    weight, members = arms("weight", WEIGHT), arms("members", MEMBERS)
    assert [(arm.name, arm.place, arm.run) for arm in weight] == [
        ("csm", "digits-hard", "csm"),
        ("heavy", "digits-hard", "weight.heavy"),
        ("pixel", "digits-hard", "csm-pixel"),
    ]
    named = {(arm.config, arm.name): arm for arm in members}
    assert named["digits-hard", "csm"].run == named["digits-hard", "round"].run == "csm"
    assert named["digits-hard", "same"].place == "digits-hard"
    places = {arm.place for arm in members}
    assert len(places) == 6  # of two data sets, with three kinds of labels
    assert named["gaussians", "one"].place.startswith("gaussians-")
    assert named["gaussians", "one"].place.removeprefix("gaussians") == named["digits-hard", "one"].place.removeprefix(
        "digits-hard"
    )


def test_the_configuration_of_a_workspace_has_what_all_studies_need_there():
    config = place_config("digits-hard", {"members": MEMBERS}, STUDIES, "/base", 2, ["train.optimizer.epochs=7"])
    assert config.train.optimizer.epochs == 7
    assert list(config.train.chosen) == ["csm", "members.same"]
    assert config.train.chosen["members.same"].mixed.annotator == "moved"
    assert config.annotate.encoders["views"].parameters == {"views": 5}
    assert config.plan.kinds == ("semantic", "pixel")  # what study weight needs
    one = next(arm for arm in arms("members", MEMBERS) if arm.name == "one")
    config = place_config(one.place, {"members": MEMBERS}, STUDIES, "/base", 2)
    assert config.annotate.members == 1
    assert list(config.train.chosen) == ["members.one"]
    later = next(arm for arm in arms("members", MEMBERS) if arm.name == "round")
    config = place_config(later.place, {"members": MEMBERS}, STUDIES, "/base", 2)
    assert [str(path) for path in config.annotate.teacher.models] == ["/base/runs/csm-seed*"]


def test_studies_by_name():
    assert list(choose_studies([], STUDIES)) == ["weight", "members"]
    assert list(choose_studies(["members", "members"], STUDIES)) == ["members"]
    with pytest.raises(InputError, match="STUDY: unknown 'nope'; one of weight, members"):
        choose_studies(["nope"], STUDIES)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"question": "?", "hope": "!", "configs": ["digits"]}, "study mine: methods: missing; it must be set"),
        (
            {"question": "?", "hope": "!", "configs": ["digits"], "methods": {"a": {}}, "set": {}},
            "study mine: set: no such setting",
        ),
        (None, "study mine: "),
    ],
)
def test_a_study_that_cannot_be_used_is_refused(values, told):
    with pytest.raises(InputError, match=told):
        parse_study("mine", values)


def test_a_method_that_does_not_exist_is_named():
    wrong = Study("?", "!", ("digits-hard",), {"a": {"like": "nope"}})
    with pytest.raises(InputError, match=r"study mine: methods.a.like: unknown 'nope'"):
        place_config("digits-hard", {"mine": wrong}, {"mine": wrong}, "/base", 1)
    wrong = Study("?", "!", ("digits-hard",), {"a": {"like": "focal", "method.mixed.weight": 1}})
    with pytest.raises(InputError, match=r"study mine: methods.a.method.mixed.weight: the method has no mixed"):
        place_config("digits-hard", {"mine": wrong}, {"mine": wrong}, "/base", 1)
