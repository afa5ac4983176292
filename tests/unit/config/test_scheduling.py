"""Config of the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.config import JobSchedulingConfig, SchedulingConfig, ServeConfig, from_dict, load_yaml, to_dict
from tandem.errors import ConfigError

TEXT = """\
tenants:
  research: {weight: 2, quota: {gpus: 64}}
  interns: {limit: {gpus: 8, cpus: 64}}
priority_classes: {low: -1, normal: 0, urgent: 5}
default_time_limit: "12:00:00"
max_time_limit: 7-00:00:00
"""


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "scheduling.yaml"
    path.write_text(TEXT)
    config = load_yaml(SchedulingConfig, path)
    assert config.tenants["research"].weight == 2.0
    assert config.tenants["research"].quota.gpus == 64
    assert config.tenants["interns"].limit.cpus == 64
    assert config.level("urgent") == 5
    assert config.level(None) == 0
    assert config.time_limit_s(None) == 12 * 3600
    assert config.time_limit_s("30") == 1800
    assert from_dict(SchedulingConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tenants": {"a": {"wight": 2}}}, r"tenants\.a\.wight is not a setting\. Did you mean 'weight'\?"),
        ({"tenants": {"a": {"weight": 0}}}, r"tenants\.a\.weight is 0\.0; it must be above 0"),
        ({"tenants": {"a": {"quota": {"gpus": -1}}}}, r"tenants\.a\.quota\.gpus is -1\.0; it must be at least 0"),
        (
            {"tenants": {"a": {"quota": {"gpus": 8}, "limit": {"gpus": 4}}}},
            r"tenants\.a\.quota\.gpus is 8, above tenants\.a\.limit\.gpus 4\. Raise the limit",
        ),
        ({"priority_classes": {}}, "priority_classes is empty"),
        ({"priority_classes": {"normal": 200}}, "would never give way to serving. Raise serving_level"),
        ({"default_priority": "norml"}, "must be one of low, normal, high. Did you mean 'normal'?"),
        ({"default_time_limit": "soon"}, "default_time_limit is 'soon'; it must be a duration above 0"),
        ({"default_time_limit": "0"}, "must be a duration above 0"),
        ({"default_time_limit": "2-0", "max_time_limit": "1-0"}, "default_time_limit is 2-0, above max_time_limit 1-0"),
        ({"half_life_s": 0}, "half_life_s is 0.0; it must be above 0"),
        ({"max_preemptions": -1}, "max_preemptions is -1; it must be at least 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_reason(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(SchedulingConfig, values)


def test_a_job_names_a_class_and_a_limit_of_its_cluster() -> None:
    config = SchedulingConfig(max_time_limit="2-00:00:00")
    job = from_dict(JobSchedulingConfig, {"priority": "high", "time_limit": "08:00:00"})
    assert config.level(job.priority) == 1
    assert config.time_limit_s(job.time_limit) == 8 * 3600
    with pytest.raises(ConfigError, match=r"scheduling.priority is 'hgh'.*Did you mean 'high'"):
        config.level("hgh")
    with pytest.raises(ConfigError, match=r"time_limit is 3-0; this cluster allows at most 2-00:00:00"):
        config.time_limit_s("3-0")


def test_a_duration_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "scheduling.yaml"
    path.write_text("default_time_limit: 12:00:00\n")
    assert load_yaml(SchedulingConfig, path).default_time_limit == "12:00:00"


def test_a_jobs_time_limit_is_checked_before_a_cluster_is_known() -> None:
    with pytest.raises(ConfigError, match="scheduling.time_limit is '8h'; it must be a duration"):
        JobSchedulingConfig(time_limit="8h")


def test_an_app_has_the_scheduler_s_settings_and_checks_its_fine_tuning_jobs_against_them() -> None:
    values = {"scheduling": {"priority_classes": {"normal": 0, "idle": -3}, "max_time_limit": "2-00:00:00"}}
    config = from_dict(ServeConfig, {**values, "gateway": {"fine_tuning": {"priority": "idle", "time_limit": "90"}}})
    assert config.scheduling.level(config.gateway.fine_tuning.priority) == -3
    with pytest.raises(ConfigError, match=r"gateway\.fine_tuning\.priority"):
        from_dict(ServeConfig, {**values, "gateway": {"fine_tuning": {"priority": "low"}}})
    with pytest.raises(ConfigError, match="this cluster allows at most 2-00:00:00"):
        from_dict(ServeConfig, {**values, "gateway": {"fine_tuning": {"time_limit": "3-00:00:00"}}})
    with pytest.raises(ConfigError, match="put it in quotes"):
        from_dict(ServeConfig, {"gateway": {"fine_tuning": {"time_limit": 7200}}})
