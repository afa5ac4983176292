"""A refused key is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config import ServeConfig, load_yaml, located
from tandem.errors import ConfigError

TEXT = """\
app: mine
models:
  - model: a
    engine_args:
      dtype: float32
  - model: b
    replicas: 2
    engine_args: {max_num_seqs: 4,
                  dtyp: float32}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("app", 1),
        ("models[0].model", 3),
        ("models[1].engine_args.dtyp", 9),
        ("models[1].engine_args", 8),
        ("models[1]", 6),
    ],
)
def test_the_line_of_a_key_is_said(path: Path, key: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"app\.yaml line {line}: .*is wrong"), located(path):
        raise ConfigError(f"{key} is wrong.")


@pytest.mark.parametrize("message", ["models[2].model is wrong.", "gateway.replicas is wrong.", "Nothing works."])
def test_what_is_not_in_the_file_has_no_line(path: Path, message: str) -> None:
    with pytest.raises(ConfigError) as refused, located(path):
        raise ConfigError(message)
    assert str(refused.value) == message


def test_a_value_that_was_laid_over_the_file_has_no_line(path: Path) -> None:
    with pytest.raises(ConfigError) as refused, located(path, ["app=2"]):
        raise ConfigError("app is wrong.")
    assert str(refused.value) == "app is wrong."


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("app: mine", "ap: mine", r"line 1: ap is not a setting"),
        ("replicas: 2", "replicas: none", r"line 7: models\[1\]\.replicas is 'none'"),
        ("replicas: 2", "replicas: 0", r"line 7: models\[1\]\.replicas is 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_line(path: Path, before: str, after: str, said: str) -> None:
    path.write_text(TEXT.replace(before, after))
    with pytest.raises(ConfigError, match=said):
        load_yaml(ServeConfig, path)
