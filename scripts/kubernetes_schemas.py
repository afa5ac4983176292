"""JSON schemas of custom resources, from the files of their CustomResourceDefinitions.

    python scripts/kubernetes_schemas.py "NAME VERSION, LICENCE" CRD.yaml [...] [-- "NAME VERSION, LICENCE" CRD.yaml ...]

writes `deploy/kubernetes/schemas/crds.json`, by which tests check manifests offline. Kept: fields, types, enumerations, bounds
and patterns, of the newest version of each kind that is served. Dropped: descriptions, defaults and CEL rules, which JSON schema
cannot express. Where a CustomResourceDefinition lists fields, no others are allowed, as in an API server with
`fieldValidation=Strict`. Schemas that occur more than once (each pod template) stand under `$defs`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

OUTPUT = Path(__file__).resolve().parents[1] / "deploy" / "kubernetes" / "schemas" / "crds.json"
KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "required")
COMBINED = ("oneOf", "anyOf", "allOf")
SHARED_CHARS = 160
"""Length of a schema's JSON from which it is written once if it occurs twice."""
METADATA = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("name", "generateName", "namespace")},
        **{name: {"type": "object", "additionalProperties": {"type": "string"}} for name in ("labels", "annotations")},
        "finalizers": {"type": "array", "items": {"type": "string"}},
    },
    "additionalProperties": False,
}
"""What a manifest may say of an object as a whole."""


def compact(schema: dict[str, Any], *, closed: bool = True) -> dict[str, Any]:
    """An OpenAPI v3 schema as JSON schema. `closed`: unknown fields are refused where fields are listed."""
    found = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    if "properties" in schema:
        found["properties"] = {name: compact(child) for name, child in schema["properties"].items()}
        if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = compact(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = compact(schema["items"])
    # The branches of a combination name some fields only; the schema around them says which there are.
    for key in COMBINED:
        if key in schema and not schema.get("x-kubernetes-int-or-string"):
            found[key] = [compact(branch, closed=False) for branch in schema[key]]
    if "not" in schema:
        found["not"] = compact(schema["not"], closed=False)
    return found


def kinds(definition: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`GROUP/VERSION/KIND` and the schema of each version that a CustomResourceDefinition serves."""
    names = definition["spec"]["names"]
    for version in definition["spec"]["versions"]:
        if version["served"]:
            schema = compact(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            yield f"{definition['spec']['group']}/{version['name']}/{names['kind']}", schema


def share(schemas: dict[str, Any]) -> dict[str, Any]:
    """The same schemas with those that occur more than once replaced by references, and `$defs` with these."""
    counts: Counter[str] = Counter()

    def count(value: Any) -> None:
        if isinstance(value, dict):
            text = json.dumps(value, sort_keys=True)
            counts[text] += 1
            if counts[text] > 1:
                return
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            count(child)

    definitions: dict[str, Any] = {}

    def replace(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(child) for child in value]
        if not isinstance(value, dict):
            return value
        text = json.dumps(value, sort_keys=True)
        replaced = {key: replace(child) for key, child in value.items()}
        # A map of fields is no schema, even where one of the fields is named "type".
        is_schema = isinstance(value.get("type"), str | list)
        if not is_schema or counts[text] < 2 or len(text) < SHARED_CHARS:
            return replaced
        name = hashlib.sha256(text.encode()).hexdigest()[:10]
        definitions[name] = replaced
        return {"$ref": f"#/$defs/{name}"}

    count(schemas)
    return {"kinds": replace(schemas), "$defs": dict(sorted(definitions.items()))}


def newest(names: list[str]) -> list[str]:
    """Of each kind the name with the newest version: v1 before v1beta1 before v1alpha1."""
    found: dict[tuple[str, str], str] = {}
    for name in names:
        group, version, kind = name.split("/")
        known = found.get((group, kind))
        if known is None or _rank(version) > _rank(known.split("/")[1]):
            found[group, kind] = name
    return sorted(found.values())


def _rank(version: str) -> tuple[bool, str]:
    return version[1:].isdigit(), version


def main(arguments: list[str]) -> None:
    sources, schemas = {}, {}
    for part in "\n".join(arguments).split("\n--\n"):
        source, *files = part.split("\n")
        for file in files:
            found = dict(kinds(yaml.safe_load(Path(file).read_text())))
            schemas.update(found)
            sources.update(dict.fromkeys(found, source))
    kept = newest(list(schemas))
    comment = "Made by scripts/kubernetes_schemas.py; no field of the definitions is written here by hand."
    document = {
        "$comment": comment,
        "sources": {name: sources[name] for name in kept},
        **share({name: schemas[name] for name in kept}),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{OUTPUT}: {len(kept)} kinds, {OUTPUT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
