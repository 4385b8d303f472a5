"""Overrides over a file over the defaults: which value stands in the end, and what null removes."""

import pytest

from flows.config import load_config
from tests.flows.config_errors import refused


@pytest.mark.parametrize("override", ["x", "=3", "a..b=3", ".a=1", "a.=1", ""])
def test_a_malformed_override_is_refused(override):
    assert refused("demo", override) == f"--set {override}: expected dotted.key=value"


def test_an_override_with_bad_yaml_is_refused():
    assert refused("demo", "plan.pairs=[[0, 1]") == "--set plan.pairs=[[0, 1]: the value is not valid YAML"
    assert refused("demo", "data={a: 1, a: 2}").endswith("the value is not valid YAML: the key 'a' stands there twice")


def test_overrides_are_yaml_and_the_last_one_wins():
    overrides = [
        "plan.pairs=[[0, 1], [4, 2]]",
        "generator.block_channels=[4, 8]",
        "train.seeds=1",
        "train.seeds=7",
        "description=a=b",
    ]
    config = load_config("demo", overrides)
    assert config.plan.pairs == ((0, 1), (4, 2))
    assert config.generator.block_channels == (4, 8)
    assert config.train.seeds == 7
    assert config.description == "a=b"
    assert config.generator.steps == load_config("demo").generator.steps


@pytest.mark.parametrize("text", ["1e-1", "0.1", "'0.1'", ".1"])
def test_parameters_of_a_source_get_their_types(text):
    assert load_config("digits", [f"data.val={text}"]).data == {"source": "digits", "val": 0.1}  # YAML reads 1e-1 as a string


def test_parameters_of_a_network_get_their_types():
    assert load_config("digits", ["train.parameters.width='16'"]).train.parameters == {"width": 16}


@pytest.mark.parametrize("override", ["train.methods.mixup=null", "train.methods.mixup="])
def test_null_removes_what_the_defaults_have(override):
    assert "mixup" not in load_config("demo", [override, "train.compare=[csm]"]).train.methods
    assert refused("demo", override).startswith("train.compare: unknown 'mixup'; one of ")


def test_null_brings_back_the_default_of_a_setting():
    demo, digits = (load_config(name, ["generator.steps=null", "evaluate.bins=null"]) for name in ("demo", "digits"))
    assert demo.generator.steps == digits.generator.steps == 1000
    assert demo.evaluate.bins == 15  # nothing stood there to remove


def test_null_removes_the_same_whether_the_file_has_the_section_or_not(config_file):
    path = config_file("train: {methods: {csm: {loss: focal}}}")
    for name in ("demo", path):
        assert load_config(name, ["train.methods.csm.mixed=null"]).train.methods["csm"].mixed is None


@pytest.mark.parametrize("key", ["name", "data", "train"])
def test_null_of_a_whole_needed_section_is_refused(key):
    assert refused("demo", f"{key}=null") == f"{key}: missing; it must be set"


def test_null_of_a_needed_key_is_refused():
    assert refused("demo", "train.methods=null") == "train.methods: missing; it must be set"
    assert refused("demo", "data.source=null").startswith("data.source: unknown None; one of ")


def test_another_source_replaces_the_parameters_of_the_first(tmp_path):
    config = load_config("image-folder", ["data.path=p", "data.source=digits"])
    assert config.data == {"source": "digits"}
    config = load_config("demo", ["data.noise=0.2", "data.source=image-folder", f"data.path={tmp_path}"])
    assert config.data == {"source": "image-folder", "path": str(tmp_path)}


def test_the_same_source_keeps_its_parameters(config_file):
    path = config_file("data: {source: digits-hard, noise: 0.3}")
    assert load_config(path, ["data.source=digits-hard", "data.blur=0.1"]).data == {
        "source": "digits-hard",
        "noise": 0.3,
        "blur": 0.1,
    }
