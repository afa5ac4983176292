"""The OpenAI endpoint as a Serve app.

serve run serve_apps.openai:app                              # the newest registered model
serve run serve_apps.openai:app config=my-app.yaml           # or TANDEM_SERVE_CONFIG=my-app.yaml
serve deploy serve_apps/openai.yaml                          # with the app's config in `args`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from tandem.apps.build import build_app
from tandem.config import ServeConfig, apply_overrides, from_dict, load_yaml, located
from tandem.settings import settings


def app(args: dict[str, Any]) -> serve.Application:
    """Build the app from Serve's arguments: keys of ServeConfig, or `config`, the path of a YAML file with them.

    On the command line (`key=value`) dotted keys reach inside: `gateway.replicas=2`.
    """
    values = dict(args)
    file = values.pop("config", None) or (settings().serve_config if not values else None)
    flat = [f"{key}={value}" for key, value in values.items() if isinstance(value, str)]
    nested = {key: value for key, value in values.items() if not isinstance(value, str)}
    if file is not None:
        with located(Path(file), flat):
            return build_app(load_yaml(ServeConfig, Path(file), flat))
    return build_app(from_dict(ServeConfig, apply_overrides(nested, flat)))
