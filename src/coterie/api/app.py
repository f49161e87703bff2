"""The service as a FastAPI application."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from coterie.api.asking import Desk
from coterie.api.guard import Guard, respond
from coterie.api.jobs import GoneError, RequestError
from coterie.api.keys import Keys
from coterie.api.limits import Limits
from coterie.api.metrics import Metrics
from coterie.api.page import PAGE, policy_of
from coterie.api.reading import Reader
from coterie.api.routes import Routes
from coterie.api.served import Served
from coterie.api.worker import Worker

_GONE = 499  # nobody reads this answer


def make_app(served: Served, worker: Worker, keys: Keys, limits: Limits, hosts: Sequence[str] | None = None) -> ASGIApp:
    """The application for the models of ``served``, which ``worker`` computes.

    ``hosts`` are the names that it answers to, None for any: a service without keys answers to those of this machine.
    """
    app = FastAPI(  # its pages fetch scripts from elsewhere, and its redirects go where the Host header says
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    metrics, reader = Metrics(worker), Reader(served, keys)
    routes = Routes(reader, Desk(worker, limits), limits, metrics)

    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy_of(PAGE)})

    async def health() -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "stopped"}, 200 if worker.alive else 503)

    async def counts(request: Request) -> Response:
        reader.caller(request)
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    def add(path: str, method: str, endpoint: Callable[..., object]) -> None:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    add("/", "GET", page)
    add("/health", "GET", health)
    add("/metrics", "GET", counts)
    add("/v1/models", "GET", routes.models)
    add("/v1/models/{name:path}", "GET", routes.model)
    add("/v1/classify", "POST", routes.classify)
    add("/v1/embeddings", "POST", routes.embeddings)
    add("/v1/chat/completions", "POST", routes.chat)
    add("/v1/completions", "POST", routes.completions)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(GoneError, _gone)
    app.add_exception_handler(HTTPException, _http)
    return Guard(app, limits, metrics, None if hosts is None else frozenset(hosts))


async def _refused(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, RequestError)
    return respond(fault)


async def _gone(_: Request, fault: Exception) -> Response:
    return Response(status_code=_GONE)


async def _http(_: Request, fault: Exception) -> Response:
    """Of a route that there is not, or a method that it does not take."""
    assert isinstance(fault, HTTPException)
    text = {404: "no such route", 405: "this route does not take this method"}.get(fault.status_code, "bad request")
    return respond(RequestError(text, fault.status_code))
