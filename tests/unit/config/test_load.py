"""The loader: YAML and --set into dataclasses, strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tandem.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    ServeConfig,
    ServedModelConfig,
    TrainConfig,
    apply_overrides,
    from_dict,
    load_yaml,
    to_dict,
)
from tandem.config.load import parse_yaml, read_yaml
from tandem.config.slurm import SlurmSite
from tandem.errors import ConfigError

MINIMAL = {"name": "base", "data": {"path": "text"}}


@dataclass(frozen=True, kw_only=True)
class Everything:
    """One field of each kind that the loader knows."""

    count: int = 1
    share: float = 0.5
    word: str = "w"
    flag: bool = False
    maybe: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    words: tuple[str, ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


def test_a_yaml_file_becomes_a_config_with_defaults_for_the_rest(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("name: base\ndata: {path: text}\noptimizer: {learning_rate: 1e-4, betas: [0.9, 0.99]}\n")
    config = load_yaml(TrainConfig, path)
    assert config == TrainConfig(
        name="base", data=DataConfig(path="text"), optimizer=OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.99))
    )


def test_overrides_are_laid_over_the_file_and_reach_into_sections_that_it_lacks(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("name: base\nsteps: 5\ndata: {path: text}\n")
    config = load_yaml(TrainConfig, path, ["steps=7", "parallel.workers=2", "lora.rank=8", "model.base=b"])
    assert (config.steps, config.parallel.workers, config.data.path) == (7, 2, "text")
    assert config.lora == LoraConfig(rank=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, r"stepz is not a setting\. Did you mean 'steps'\?"),
        (
            {"optimizer": {"learning_rat": 1}},
            r"optimizer\.learning_rat is not a setting\. Did you mean 'learning_rate'\?",
        ),
        ({"zzz": 1}, "zzz is not a setting. Known here: name, data, model"),
        ({1: 2}, "1 is not a setting"),
        ({"data": {}}, "data.path is missing. Name a dataset, or several in data.mixture"),
        (
            {"data": {"path": "a", "mixture": [{"path": "b"}]}},
            r"data.path \('a'\) and data.mixture \(1 datasets\) are both",
        ),
        ({"data": {"mixture": [{"path": "b", "weight": 0}]}}, "the weight of 'b' is 0; it must be above 0"),
        ({"data": {"mixture": [{"path": "b", "wieght": 1}]}}, r"data.mixture\[0\].wieght is not a setting"),
        ({"data": {"mixture": [{"path": "b"}, {"path": "b"}]}}, "names 'b' twice"),
        ({"data": None}, "data is empty; it must be a mapping"),
        ({"data": ["text"]}, r"data is \['text'\] \(list\); it must be a mapping"),
        ({"steps": "ten"}, r"steps is 'ten' \(str\); it must be a whole number"),
        ({"steps": 1.5}, "steps is 1.5 .* whole number"),
        ({"steps": True}, "steps is True .* whole number"),
        ({"steps": None}, "steps is empty; it must be a whole number"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"optimizer": {"weight_decay": True}}, "weight_decay is True .* number"),
        ({"optimizer": {"learning_rate": "fast"}}, "learning_rate is 'fast' .* finite number"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate is nan .* finite number"),
        ({"optimizer": {"clip_norm": float("inf")}}, "clip_norm is inf .* finite number"),
        ({"optimizer": {"clip_norm": 10**400}}, "finite number"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas has 1 values; it must have 2"),
        ({"optimizer": {"betas": 0.9}}, "betas is 0.9 .* must be a list"),
        ({"optimizer": {"betas": [0.9, "x"]}}, r"betas\[1\] is 'x'"),
        ({"optimizer": {"schedule": "cosin"}}, "must be one of cosine, linear, wsd, constant. Did you mean 'cosine'"),
        ({"model": {"tie_embeddings": "yes"}}, "tie_embeddings is 'yes' .* true or false"),
        ({"name": "no/slash"}, "'no/slash' cannot be used"),
        ({"precision": "bf16"}, "must be one of float32, bfloat16"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_key(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, {**MINIMAL, **values})


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match=r"^name is missing"):
        from_dict(TrainConfig, {"data": {"path": "x"}})
    with pytest.raises(ConfigError, match=r"models\[1\]\.model is missing"):
        from_dict(ServeConfig, {"models": [{"model": "a"}, {"replicas": 1}]})


def test_only_a_mapping_is_a_config():
    with pytest.raises(ConfigError, match=r"the config is \[1\]"):
        from_dict(TrainConfig, [1])  # type: ignore[arg-type]


def test_numbers_become_floats_or_text_where_those_are_meant():
    config = from_dict(Everything, {"share": 1, "word": 12, "maybe": "1e-3", "pair": [1, 2], "env": {"N": 4}})
    assert config == Everything(share=1.0, word="12", maybe=0.001, pair=(1.0, 2.0), env={"N": "4"})
    assert isinstance(config.share, float)


def test_a_number_that_yaml_has_already_shortened_is_not_taken_as_text(tmp_path):
    (tmp_path / "c.yaml").write_text("name: 1.10\ndata: {path: text}\n")
    with pytest.raises(ConfigError, match="name is a number, 1.1; put it in quotes"):
        load_yaml(TrainConfig, tmp_path / "c.yaml")


def test_null_clears_what_may_be_unset_and_nothing_else():
    assert from_dict(Everything, {"maybe": None}).maybe is None
    with pytest.raises(ConfigError, match="word is empty; it must be text"):
        from_dict(Everything, {"word": None})


def test_engine_settings_pass_through_as_they_are():
    args = {"max_model_len": 512, "nested": {"a": [1, None]}, "dtype": "float32"}
    config = from_dict(ServeConfig, {"models": [{"model": "m", "engine_args": args}]})
    assert config.models[0].engine_args == args


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("x=1", 1),
        ("x=1.5", 1.5),
        ("x=3e-4", 3e-4),
        ("x=true", True),
        ("x=null", None),
        ("x=[1, 2]", [1, 2]),
        ("x={a: 1}", {"a": 1}),
        ("x=word", "word"),
        ("x=a=b", "a=b"),
        ("x=", None),
        (" x =1", 1),
    ],
)
def test_the_value_of_an_override_is_yaml(override, value):
    assert apply_overrides({}, [override]) == {"x": value}


@pytest.mark.parametrize("override", ["x", "=1", "a..b=1", ".a=1", "a.=1", "x=[1"])
def test_an_override_of_another_form_is_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({}, [override])


def test_an_override_cannot_reach_into_a_value():
    with pytest.raises(ConfigError, match="steps is a int, it has no keys"):
        apply_overrides({"steps": 1}, ["steps.a=1"])


def test_the_last_override_wins_and_the_original_stays():
    values = {"a": {"b": 1}}
    assert apply_overrides(values, ["a.b=2", "a.b=3", "a.c=4"]) == {"a": {"b": 3, "c": 4}}
    assert values == {"a": {"b": 1}}


def test_a_missing_file_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "pretrain.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"No config file at .*Did you mean 'pretrain\.yaml'"):
        read_yaml(tmp_path / "pretrian.yaml")
    with pytest.raises(ConfigError, match="No config file"):
        read_yaml(tmp_path / "no" / "where.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\nb: [1, 2\n", "line 3 is not YAML"),
        (b"a: 1\n\tb: 2\n", "line 2 is not YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"just words", "holds a str"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: \x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_an_empty_file_is_an_empty_config(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_yaml(ServeConfig, path) == ServeConfig()


finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


betas = st.floats(0, 1, exclude_max=True)


@st.composite
def train_configs(draw):
    """Training configs that are allowed."""
    workers, accumulate = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    base = draw(st.none() | texts)
    lora = st.builds(LoraConfig, rank=st.integers(1, 512), alpha=finite, dropout=st.floats(0, 0.99))
    model = ModelConfig(
        base=base,
        architecture=draw(st.sampled_from(["llama", "qwen3"])),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * groups,
        hidden_size=kv_heads * groups * 2 * draw(st.integers(1, 64)),
        tie_embeddings=draw(st.booleans()),
    )
    return TrainConfig(
        name=draw(names),
        data=draw(
            st.builds(DataConfig, path=texts.filter(bool), sequence_length=st.integers(8, 9999), shuffle=st.booleans())
        ),
        model=model,
        lora=None if base is None else draw(st.none() | lora),
        parallel=ParallelismConfig(workers=workers, strategy=draw(st.sampled_from(["fsdp2", "ddp"]))),
        optimizer=draw(st.builds(OptimizerConfig, learning_rate=st.floats(1e-9, 1e3), betas=st.tuples(betas, betas))),
        checkpoint=draw(st.builds(CheckpointConfig, every_steps=st.integers(0, 10**6))),
        batch_size=workers * accumulate * draw(st.integers(1, 16)),
        accumulate=accumulate,
        seed=draw(st.integers()),
    )


@given(train_configs())
def test_a_train_config_survives_dict_json_and_yaml(config):
    values = to_dict(config)
    assert from_dict(TrainConfig, values) == config
    assert from_dict(TrainConfig, json.loads(json.dumps(values))) == config
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(values, sort_keys=False))) == config


@given(
    st.lists(
        st.builds(
            ServedModelConfig,
            model=texts,
            engine_args=st.dictionaries(texts, json_values, max_size=3),
            env=st.dictionaries(texts, texts, max_size=3),
        ),
        max_size=3,
        unique_by=lambda served: served.model,
    )
)
def test_a_serve_config_survives_dict_and_json(models):
    config = ServeConfig(models=tuple(models))
    assert from_dict(ServeConfig, to_dict(config)) == config
    assert from_dict(ServeConfig, json.loads(json.dumps(to_dict(config)))) == config


@given(st.dictionaries(texts, json_values, max_size=5))
def test_whatever_a_mapping_holds_it_is_a_config_or_a_config_error(values):
    for cls in (TrainConfig, ServeConfig, Everything):
        try:
            from_dict(cls, {**MINIMAL, **values} if cls is TrainConfig else values)
        except ConfigError:
            pass


@given(texts, json_values)
def test_whatever_one_setting_holds_it_is_a_config_or_a_config_error(key, value):
    for field_name in Everything.__dataclass_fields__:
        try:
            assert isinstance(from_dict(Everything, {field_name: value}), Everything)
        except ConfigError as error:
            assert field_name in str(error)


@given(st.text(max_size=30))
def test_whatever_an_override_says_it_is_applied_or_a_config_error(text):
    try:
        apply_overrides({"a": {"b": 1}}, [text])
    except ConfigError:
        pass


def test_a_config_derives_from_another_by_replace():
    base = TrainConfig(name="base", data=DataConfig(path="text"))
    assert replace(base, steps=7) == from_dict(TrainConfig, {**MINIMAL, "steps": 7})


def test_a_time_of_day_is_text_and_not_a_number_of_seconds(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("time: 12:30:00\n")
    assert load_yaml(SlurmSite, path).time == "12:30:00"
    assert load_yaml(SlurmSite, path, ["time=1:30:00"]).time == "1:30:00"
    assert parse_yaml("[12, 1.5, -3, 1e3, 0x10, 1:2]") == [12, 1.5, -3, "1e3", 16, "1:2"]
