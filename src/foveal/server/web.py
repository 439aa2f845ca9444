"""The page at /: three files of the package, and headers that keep everything else out."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/look.js": ("look.js", "text/javascript; charset=utf-8"),
}
PATHS = tuple(_FILES)
"""What needs no API key: the page asks for it."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _serve(path: str, name: str, media_type: str) -> None:
    content = files("foveal.server").joinpath("page", name).read_bytes()

    @router.get(path)
    async def _file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)


for _path, (_name, _type) in _FILES.items():
    _serve(_path, _name, _type)
