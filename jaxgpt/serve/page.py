"""The chat page: its files and the content security policy that the browser applies to them.

The page loads nothing from other servers. Scripts and styles come only from the files served here,
and Trusted Types forbid every function that turns text into HTML, so a model's output can never
become markup or code.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("web")
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
FILES = {
    "/": FOLDER / "chat.html",
    **{
        f"/page/{file.relative_to(FOLDER).as_posix()}": file
        for file in sorted(FOLDER.rglob("*"))
        if file.suffix in MEDIA_TYPES
    },
}
"""The server's paths, and the file that each one serves."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def read_files() -> dict[str, tuple[bytes, str]]:
    """Returns the content and the media type of every file, by the server's path."""
    return {
        path: (file.read_bytes(), MEDIA_TYPES.get(file.suffix, "text/html"))
        for path, file in FILES.items()
    }
