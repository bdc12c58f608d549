"""The files of the chat page, and its content security policy.

The page loads nothing from other servers. The policy allows scripts and styles from this server's
files only, and Trusted Types forbid every function that converts text to HTML, so a model's output
can never become markup or code.
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
"""Maps the server's paths to the files that they serve."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def read_files() -> dict[str, tuple[bytes, str]]:
    """Reads all files; returns their content and media type by the server's path."""
    return {
        path: (file.read_bytes(), MEDIA_TYPES.get(file.suffix, "text/html"))
        for path, file in FILES.items()
    }
