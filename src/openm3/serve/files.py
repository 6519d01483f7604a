"""/v1/files: pictures and videos uploaded once and named by id in requests. Kept on disk until the server ends."""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from starlette.responses import Response

from openm3.serve.errors import OPENAI_ERRORS, ApiError, json_response
from openm3.serve.options import ServeOptions

FILE_PREFIX = "file-"


@dataclass(frozen=True)
class StoredFile:
    """What is told of a file, in OpenAI's shape."""

    id: str
    filename: str
    bytes: int
    created_at: int
    purpose: str
    object: str = "file"
    status: str = "processed"


class FileStore:
    """Files in a directory of their own, which goes with the server; the oldest make room for new ones."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._directory = TemporaryDirectory(prefix="openm3-files-")
        self._files: dict[str, StoredFile] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes, filename: str, purpose: str) -> StoredFile:
        """Raises ApiError for an empty file or one that is larger than all files together may be."""
        if not data:
            raise ApiError(400, "file: it is empty", param="file")
        if len(data) > self._options.max_files_bytes:
            raise ApiError(413, f"file: over the limit of {self._options.max_files_bytes:,} bytes", param="file")
        name = f"{FILE_PREFIX}{uuid.uuid4().hex}"
        file = StoredFile(name, filename[:200], len(data), int(time.time()), purpose[:100])
        self._path(file.id).write_bytes(data)
        with self._lock:
            self._files[file.id] = file
            while len(self._files) > self._options.max_files or self._bytes() > self._options.max_files_bytes:
                self._remove(next(iter(self._files)))
        return file

    def list(self) -> list[StoredFile]:
        with self._lock:
            return list(self._files.values())

    def get(self, file_id: str) -> StoredFile:
        """Raises ApiError (404) for an unknown id."""
        with self._lock:
            if file_id not in self._files:
                raise ApiError(404, f"no file has the id {file_id[:80]!r}")
            return self._files[file_id]

    def read(self, file_id: str) -> bytes:
        """Raises ApiError (404) for an unknown id."""
        file = self.get(file_id)
        try:
            return self._path(file.id).read_bytes()
        except FileNotFoundError:
            raise ApiError(404, f"no file has the id {file_id[:80]!r}") from None

    def delete(self, file_id: str) -> None:
        """Raises ApiError (404) for an unknown id."""
        self.get(file_id)
        with self._lock:
            self._remove(file_id)

    def close(self) -> None:
        self._directory.cleanup()

    def _path(self, file_id: str) -> Path:
        return Path(self._directory.name) / file_id

    def _bytes(self) -> int:
        return sum(file.bytes for file in self._files.values())

    def _remove(self, file_id: str) -> None:
        if self._files.pop(file_id, None):
            self._path(file_id).unlink(missing_ok=True)


def router(files: FileStore) -> APIRouter:
    routes = APIRouter(tags=["files"], responses=OPENAI_ERRORS)

    @routes.post("/v1/files")
    async def upload(file: UploadFile, purpose: Annotated[str, Form()] = "vision") -> Response:
        """Stores a picture or a video."""
        return json_response(asdict(files.add(await file.read(), file.filename or "upload", purpose)))

    @routes.get("/v1/files")
    async def listing() -> Response:
        """The files there are, oldest first."""
        data: list[Any] = [asdict(file) for file in files.list()]
        return json_response({"object": "list", "data": data, "has_more": False,
                              "first_id": data[0]["id"] if data else None,
                              "last_id": data[-1]["id"] if data else None})  # fmt: skip

    @routes.get("/v1/files/{file_id}")
    async def about(file_id: str) -> Response:
        """What is known of a file."""
        return json_response(asdict(files.get(file_id)))

    octets = {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}

    @routes.get("/v1/files/{file_id}/content", response_class=Response, responses=octets)
    async def content(file_id: str) -> Response:
        """The file's bytes."""
        return Response(files.read(file_id), media_type="application/octet-stream",
                        headers={"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"})  # fmt: skip

    @routes.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        """Removes a file."""
        files.delete(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return routes
