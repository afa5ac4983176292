"""Part of the OpenAPI document for files and uploads: paths, and the schemas of `tandem.api.openai.files`. Pure."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from tandem.api.openai.files import (
    DeletedFile,
    FileForm,
    FileList,
    FileObject,
    Upload,
    UploadCompletion,
    UploadCreation,
    UploadPart,
)

COMPONENTS = "#/components/schemas/"
BODIES = (FileForm, UploadCreation, UploadCompletion)
ANSWERS = (FileObject, FileList, DeletedFile, Upload, UploadPart)
BINARY = {"type": "string", "format": "binary", "minLength": 1}
FORM_ENCODING = {"expires_after": {"style": "deepObject", "explode": True}}
"""`expires_after[anchor]` and `expires_after[seconds]` are fields of their own."""
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Sent again within 10 minutes with the same key, the request makes nothing new",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


def file_schemas() -> dict[str, Any]:
    """The schemas by name."""
    bodies = [(model, "validation") for model in BODIES]
    answers = [(model, "serialization") for model in ANSWERS]
    _, found = models_json_schema([*bodies, *answers], ref_template=COMPONENTS + "{model}")  # type: ignore[list-item]
    schemas: dict[str, Any] = dict(found["$defs"])
    form = schemas[FileForm.__name__]
    form["properties"] = {"file": BINARY, **form["properties"]}
    form["required"] = ["file", *form["required"]]
    return schemas


def file_paths(errors: dict[str, Any]) -> dict[str, Any]:
    """The paths; `errors`: the answers with an error that each operation has."""
    file_id = _path_parameter("file_id")
    upload_id = _path_parameter("upload_id")
    page = [
        _query("after", {"type": "string"}),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000}),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}),
        _query("purpose", {"type": "string"}),
    ]
    part = {"type": "object", "required": ["data"], "properties": {"data": BINARY}}
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    paths = {
        "/v1/files": {
            "get": _operation("list_files", FileList, parameters=page),
            "post": _operation("create_file", FileObject, form=_ref(FileForm), parameters=[IDEMPOTENCY_KEY]),
        },
        "/v1/files/{file_id}": {
            "get": _operation("retrieve_file", FileObject, parameters=[file_id]),
            "delete": _operation("delete_file", DeletedFile, parameters=[file_id]),
        },
        "/v1/files/{file_id}/content": {
            "get": {
                "operationId": "download_file",
                "parameters": [file_id],
                "responses": {"200": {"description": "The content", "content": content}},
            }
        },
        "/v1/uploads": {"post": _operation("create_upload", Upload, body=UploadCreation, parameters=[IDEMPOTENCY_KEY])},
        "/v1/uploads/{upload_id}/parts": {
            "post": _operation("add_upload_part", UploadPart, form=part, parameters=[upload_id, IDEMPOTENCY_KEY])
        },
        "/v1/uploads/{upload_id}/complete": {
            "post": _operation("complete_upload", Upload, body=UploadCompletion, parameters=[upload_id])
        },
        "/v1/uploads/{upload_id}/cancel": {"post": _operation("cancel_upload", Upload, parameters=[upload_id])},
    }
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"] |= errors
    return paths


def _operation(
    name: str, answer: Any, *, body: Any = None, form: Any = None, parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """An operation that takes a JSON body or a form, and answers with one object."""
    operation: dict[str, Any] = {
        "operationId": name,
        "parameters": parameters or [],
        "responses": {"200": {"description": "The answer", "content": {"application/json": {"schema": _ref(answer)}}}},
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if form is not None:
        encoding = {"encoding": FORM_ENCODING} if form == _ref(FileForm) else {}
        operation["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": form} | encoding},
        }
    return operation


def _ref(model: Any) -> dict[str, str]:
    return {"$ref": COMPONENTS + model.__name__}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}
