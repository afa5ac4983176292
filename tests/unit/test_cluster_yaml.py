"""The files of `ray up`: by Ray's schema, AWS's own description of its API, and the template that Ray fills in for Azure."""

from __future__ import annotations

import copy
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
FILES = ("cluster.yaml", "deploy/onprem/cluster.yaml", "deploy/gcp/cluster.yaml", "deploy/azure/cluster.yaml")


def read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / file).read_text())
    return found


def check(config: dict[str, Any]) -> None:
    """What `ray up` does with a file before it looks at the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_the_file(file: str) -> None:
    check(read(file))


@pytest.mark.parametrize("file", FILES)
def test_a_misspelt_key_is_found_by_the_check(file: str) -> None:
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        check({**read(file), "idle_timeout_minute": 5})


@pytest.mark.parametrize("file", FILES)
def test_every_node_starts_through_tandem_with_the_token_and_the_environment(file: str) -> None:
    config = read(file)
    # `ray up` after a change starts nodes again.
    (ended, head), (also_ended, worker) = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert ended == also_ended == "tandem node stop"
    assert "tandem node start --head --port=6379" in head
    assert worker == "tandem node start --restart --address=$RAY_HEAD_IP:6379"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    environment = config["file_mounts"]["~/.tandem.env"]
    assert (REPOSITORY / f"{environment}.example").is_file()
    # It has a password in it: git does not know it, and a node has one copy, for its user alone.
    assert environment in (REPOSITORY / ".gitignore").read_text().split() and environment in config["rsync_exclude"]
    assert any("chmod 600 ~/.tandem.env" in command for command in config["setup_commands"])
    assert any("make setup" in command for command in config["setup_commands"])


def test_node_types_of_aws_are_what_its_api_takes() -> None:
    import boto3
    from botocore.validate import ParamValidator

    client = boto3.client("ec2", region_name="us-west-2", aws_access_key_id="x", aws_secret_access_key="x")
    shape = client.meta.service_model.operation_model("RunInstances").input_shape
    types = read("cluster.yaml")["available_node_types"]
    assert set(types) == {"head", "data", "serve", "train"}
    for name, kind in types.items():
        problems = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not problems.has_errors(), f"{name}: {problems.generate_report()}"
    misspelt = {**types["head"]["node_config"], "InstanceTypes": "m7i.large", "MinCount": 1, "MaxCount": 1}
    assert ParamValidator().validate(misspelt, shape).has_errors()


def test_machines_of_azure_have_parameters_of_the_template_that_ray_fills_in() -> None:
    import ray.autoscaler._private as autoscaler

    template = json.loads((Path(autoscaler.__file__).parent / "_azure" / "azure-vm-template.json").read_text())
    for name, kind in read("deploy/azure/cluster.yaml")["available_node_types"].items():
        assert kind["node_config"]["azure_arm_parameters"].keys() <= template["parameters"].keys(), name


def test_all_clouds_have_the_same_pools() -> None:
    pools = [
        {name: (kind.get("labels"), kind["resources"]) for name, kind in read(file)["available_node_types"].items()}
        for file in ("cluster.yaml", "deploy/gcp/cluster.yaml", "deploy/azure/cluster.yaml")
    ]
    assert pools[0] == pools[1] == pools[2]


def test_only_ssh_is_open_from_outside() -> None:
    (rule,) = read("cluster.yaml")["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) == (22, 22, "TCP")


def test_the_environment_file_is_read_by_a_shell(tmp_path: Path) -> None:
    text = (REPOSITORY / "deploy" / "tandem.env.example").read_text()
    file = tmp_path / "tandem.env"
    # As a user fills it in.
    for placeholder, value in (("<user>", "me"), ("<password>", "se$cret&x;("), ("<host>", "db")):
        text = text.replace(placeholder, value)
    file.write_text(text)
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    script = f'set -eu -a; . {file}; echo $TANDEM_HOME "$TANDEM_DATABASE_URL" $RAY_ADDRESS $RAY_AUTH_MODE $RAY_TMPDIR'
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert shown[:4] == ["/shared/tandem", "postgresql://me:se$cret&x;(@db/tandem?sslmode=require", "auto", "token"]
    assert shown[4].startswith("/tmp/tandem-")
