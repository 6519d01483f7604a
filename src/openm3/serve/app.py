"""The application: every route behind the gate, the page at `/`, and its life from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response

from openm3 import __version__
from openm3.engine import LLM
from openm3.engine.service import Service
from openm3.serve import chat, completions, files, messages, responses
from openm3.serve.errors import OPENAI_ERRORS, ApiError, api_error, error_response, json_response
from openm3.serve.files import FileStore
from openm3.serve.gate import Gate
from openm3.serve.generation import Server
from openm3.serve.media import Fetcher, MediaSource
from openm3.serve.metrics import Metrics
from openm3.serve.options import ServeOptions

log = logging.getLogger("openm3.serve")
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml",
              ".png": "image/png", ".webmanifest": "application/manifest+json"}  # fmt: skip
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(
    load: Callable[[], LLM],
    names: tuple[str, ...] = ("openm3-nano",),
    options: ServeOptions | None = None,
    *,
    fetch: Fetcher | None = None,
) -> FastAPI:
    """The server as an ASGI application, which loads its model when it starts.

    load: gives the model, on the engine's thread; names: what requests call it, the first one is listed first; fetch:
    how URLs are fetched, by default as the options say. `app.state.server` holds the service.
    """
    options = options or ServeOptions()
    metrics = Metrics()
    service = Service(load, max_requests=options.max_requests, meter=metrics)
    metrics.watch(service)
    store = FileStore(options)
    source = MediaSource(options, store, fetch or Fetcher(options))
    server = Server(service, options, names, store, source, int(time.time()))

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)
        store.close()

    app = FastAPI(title="openm3", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = server
    apis = [api.router(server) for api in (chat, completions, responses, messages)]
    for routes in (*apis, files.router(store), _operations(server, metrics), _page()):
        app.include_router(routes)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (ApiError, ValueError):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(Gate, options=options, metrics=metrics)
    for schema in app.openapi()["components"]["schemas"].values():  # the document names the models that are here
        if "model" in schema.get("properties", ()):
            schema["properties"]["model"] = {"type": "string", "enum": [*names]}
            schema["examples"] = [given | {"model": names[0]} for given in schema["examples"]]
    return app


def _operations(server: Server, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["operations"], responses=OPENAI_ERRORS)
    service = server.service

    @routes.get("/health")
    async def health() -> Response:
        """200 while the process lives and its model has not failed."""
        if service.error is not None:
            raise ApiError(503, f"the model has failed: {type(service.error).__name__}", code="unavailable")
        return json_response({"status": "ok"})

    @routes.get("/ready", responses={503: {"description": "Not now"}})
    async def ready() -> Response:
        """200 while requests are taken; 503 while the model loads and while the server drains."""
        return json_response({"ready": service.ready}, 200 if service.ready else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": server.created, "owned_by": "openm3"}
        if service.ready:
            about["max_model_len"] = service.llm.config.text.max_position_embeddings
        return about

    @routes.get("/v1/models")
    async def models() -> Response:
        """The names that requests may call the model by."""
        return json_response({"object": "list", "data": [model(name) for name in server.names]})

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One of them."""
        server.check_model(name)
        return json_response(model(name))

    return routes


def _page() -> APIRouter:
    """The web page's files, each under its own name: nothing but what lies there is ever opened."""
    routes = APIRouter(include_in_schema=False)
    found = {p.name: p for p in PAGE.iterdir() if p.suffix in PAGE_TYPES} if PAGE.is_dir() else {}

    async def asset(request: Request) -> Response:
        path = found.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type=PAGE_TYPES[path.suffix], headers=PAGE_HEADERS)

    routes.add_api_route("/", asset, methods=["GET"])
    routes.add_api_route("/{name}", asset, methods=["GET"])
    return routes


# --- errors -------------------------------------------------------------------------------------------------------


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(api_error(error), request.url.path, request.state.request_id)


async def _on_http(request: Request, error: HTTPException) -> Response:
    said = {404: f"there is nothing at {request.url.path[:100]}",
            405: f"{request.method} is not possible at {request.url.path[:100]}"}  # fmt: skip
    message = said.get(error.status_code, str(error.detail))
    answer = await _on_error(request, ApiError(error.status_code, message))
    answer.headers.update(error.headers or {})
    if error.status_code == 405:  # all that the path has, whichever of its routes was asked
        path = getattr(request.scope.get("route"), "path", "").replace(":path", "")
        if known := request.app.openapi()["paths"].get(path):
            answer.headers["Allow"] = ", ".join(sorted(method.upper() for method in known))
    return answer


async def _on_invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        detail = ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    elif first["type"] == "extra_forbidden":
        detail = ApiError(400, f"{place}: unknown field", param=place, code="unknown_parameter")
    else:
        detail = ApiError(400, f"{place or 'body'}: {first['msg']}"[:500], param=place or None)
    return await _on_error(request, detail)


# --- the process --------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Drains before it stops: at the first SIGTERM or SIGINT new requests get 503 while running answers finish."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._draining: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._server.service.draining or self._loop is None:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
            return
        self._server.service.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        service, seconds = self._server.service, self._server.options.drain_seconds
        log.info('{"draining": true, "under_way": %d}', service.under_way)
        if not await service.drain(seconds):
            log.warning("%d answers were cut off after %g seconds", service.under_way, seconds)
        self.should_exit = True


def run(
    load: Callable[[], LLM],
    names: tuple[str, ...],
    options: ServeOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains. Raises what loading the model raised."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    app = create_app(load, names, options)
    server: Server = app.state.server
    config = uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, lifespan="on", http="h11",
                            timeout_graceful_shutdown=5, server_header=False)  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    uvicorn_server = _Server(config, server)

    async def main() -> None:
        serving = asyncio.ensure_future(uvicorn_server.serve())
        watching = asyncio.ensure_future(_announce(server, uvicorn_server, f"http://{host}:{port}"))
        await serving
        watching.cancel()

    asyncio.run(main())
    if server.service.error is not None:
        raise server.service.error


async def _announce(server: Server, uvicorn_server: _Server, address: str) -> None:
    """Says on stderr that the model is loaded; ends the process where it cannot be."""
    while not server.service.ready and server.service.error is None:
        await asyncio.sleep(0.05)
    if server.service.error is not None:
        uvicorn_server.should_exit = True
        return
    print(f"{server.names[0]} is served at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
