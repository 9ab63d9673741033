"""The API reference at `/docs`: Swagger UI from its package, with the worker's document and the orchestrator's.

Everything is served by this worker; nothing is loaded from elsewhere. Knows Flask.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from flask import Blueprint, Response, jsonify, send_from_directory

from musetalk import __version__
from musetalk.errors import NotFoundError
from worker.web.openapi import document
from worker.web.openapi_orchestrator import orchestrator_document

_PAGE = Path(__file__).resolve().parent / "reference_page"
_OWN = ("docs.js", "docs.css")
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
# Swagger UI sets styles in elements and draws small pictures that are part of its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

blueprint = Blueprint("reference", __name__)


@blueprint.get("/docs")
def page() -> Response:
    """The page of the reference."""
    return _guarded(send_from_directory(_PAGE, "docs.html", max_age=0))


@blueprint.get("/docs/<name>")
def asset(name: str) -> Response:
    """Script and style of the page, and those of Swagger UI."""
    if name in _OWN:
        return _guarded(send_from_directory(_PAGE, name, max_age=0))
    if name not in _SWAGGER:
        raise NotFoundError("the reference has no such file")
    try:
        folder = Path(str(resources.files("flask_swagger_ui"))) / "dist"
    except ModuleNotFoundError:
        raise NotFoundError("flask-swagger-ui is not installed; install requirements.txt") from None
    return _guarded(send_from_directory(folder, name, max_age=86_400))


@blueprint.get("/openapi.json")
def worker_document() -> Response:
    """The OpenAPI document of this server."""
    return jsonify(document(__version__))


@blueprint.get("/openapi-orchestrator.json")
def other_document() -> Response:
    """The OpenAPI document of the routes that the worker calls."""
    return jsonify(orchestrator_document(__version__))


def _guarded(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
