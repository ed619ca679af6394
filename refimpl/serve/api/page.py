"""GET /: the page, and the files it is made of."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from refimpl.serve.errors import ApiError
from refimpl.serve.page.files import HEADERS, INDEX, read_file


async def index(request: Request) -> Response:
    """GET /."""
    return _response(INDEX)


async def file(request: Request) -> Response:
    """GET /page/{name}."""
    return _response(request.path_params["name"])


def _response(name: str) -> Response:
    try:
        content, media_type = read_file(name)
    except KeyError:
        raise ApiError(404, f"there is nothing at /page/{name[:200]}") from None
    return Response(content, media_type=media_type, headers=HEADERS)
