"""Part of the OpenAPI document for files and uploads: paths, and the schemas of `tandem.api.openai.files`. Pure."""

from __future__ import annotations

from typing import Any

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
from tandem.gateway.routes.openapi.operations import (
    AFTER,
    IDEMPOTENCY_KEY,
    Model,
    Paths,
    limit,
    operation,
    path_parameter,
    query,
    reference,
    schemas_of,
)

BODIES = (FileForm, UploadCreation, UploadCompletion)
ANSWERS = (FileObject, FileList, DeletedFile, Upload, UploadPart)
BINARY = {"type": "string", "format": "binary", "minLength": 1}
FORM_ENCODING = {"expires_after": {"style": "deepObject", "explode": True}}
"""`expires_after[anchor]` and `expires_after[seconds]` are fields of their own."""
FORGOTTEN_KEY = {
    **IDEMPOTENCY_KEY,
    "description": "Sent again within 10 minutes with the same key, the request makes nothing new",
}


def file_schemas() -> dict[str, Any]:
    """The schemas by name."""
    schemas = schemas_of(BODIES, ANSWERS)
    form = schemas[FileForm.__name__]
    form["properties"] = {"file": BINARY, **form["properties"]}
    form["required"] = ["file", *form["required"]]
    return schemas


def file_paths() -> Paths:
    """The paths."""
    file_id = path_parameter("file_id")
    upload_id = path_parameter("upload_id")
    page = [
        AFTER,
        limit(10_000, 10_000),
        query("order", {"enum": ["asc", "desc"], "default": "desc"}),
        query("purpose", {"type": "string"}),
    ]
    part = {"type": "object", "required": ["data"], "properties": {"data": BINARY}}
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "/v1/files": {
            "get": operation("list_files", FileList, parameters=page),
            "post": _form("create_file", FileObject, reference(FileForm), [FORGOTTEN_KEY], encoding=FORM_ENCODING),
        },
        "/v1/files/{file_id}": {
            "get": operation("retrieve_file", FileObject, parameters=[file_id]),
            "delete": operation("delete_file", DeletedFile, parameters=[file_id]),
        },
        "/v1/files/{file_id}/content": {
            "get": {
                "operationId": "download_file",
                "parameters": [file_id],
                "responses": {"200": {"description": "The content", "content": content}},
            }
        },
        "/v1/uploads": {"post": operation("create_upload", Upload, body=UploadCreation, parameters=[FORGOTTEN_KEY])},
        "/v1/uploads/{upload_id}/parts": {
            "post": _form("add_upload_part", UploadPart, part, [upload_id, FORGOTTEN_KEY])
        },
        "/v1/uploads/{upload_id}/complete": {
            "post": operation("complete_upload", Upload, body=UploadCompletion, parameters=[upload_id])
        },
        "/v1/uploads/{upload_id}/cancel": {"post": operation("cancel_upload", Upload, parameters=[upload_id])},
    }


def _form(
    name: str,
    answer: Model,
    schema: dict[str, Any],
    parameters: list[dict[str, Any]],
    *,
    encoding: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """An operation that takes a form."""
    content = {"schema": schema} if encoding is None else {"schema": schema, "encoding": encoding}
    body = {"required": True, "content": {"multipart/form-data": content}}
    return operation(name, answer, parameters=parameters) | {"requestBody": body}
