"""Text of several languages that Debian has for everybody: documentation packages, reduced to plain text."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cavelight.disk import cache_folder, folder_beside
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note

PREFIX = "debian:"  # `debian:one+another` as a corpus: the texts of these packages
DOCUMENT = 8192  # characters, about: a page is cut into documents of this length, so that some of each are held out
OWN = 'give texts of your own: --set \'data.corpus=[{corpus="PATH"}, {corpus="PATH"}, ...]\', or install apt and dpkg'
SILENT = {"script", "style", "head"}
BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "blockquote", "br", "table", "h1", "h2", "h3", "h4", "h5", "h6"}


def resolved(corpus: Any, on_event: Callable[[Event], None]) -> Any:
    """A recipe's `data.corpus` with folders of text in place of Debian's packages, each fetched once."""
    if isinstance(corpus, str):
        packages = corpus.removeprefix(PREFIX)
        return corpus if packages == corpus else str(text_of(packages.split("+"), on_event))
    return [{**source, "corpus": resolved(source["corpus"], on_event)} for source in corpus]


def text_of(packages: list[str], on_event: Callable[[Event], None]) -> Path:
    """The folder with the text of the packages' HTML pages, in the cache. UserError where it cannot be fetched."""
    folder = cache_folder() / "texts" / "+".join(packages)
    if folder.is_dir():
        return folder
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"The text of {', '.join(packages)} comes from Debian's packages",
                why=f"there is no {program} here",
                do=OWN,
            )
    with folder_beside(folder) as scratch:
        for package in packages:
            on_event(Note(f"Fetching {package} from Debian"))
            documents = [text for page in _pages(package) for text in cut(text_of_html(page))]
            for number, text in enumerate(documents):
                (scratch / f"{package}-{number:04}.txt").write_text(text, encoding="utf-8")
        if not any(scratch.iterdir()):
            raise UserError(f"There are no HTML pages in {', '.join(packages)}", do=OWN)
    return folder


def _pages(package: str) -> list[str]:
    """The HTML pages of a package, in the order of their names."""
    with tempfile.TemporaryDirectory() as place:
        for command in (["apt-get", "download", package], ["dpkg-deb", "-x", "DEB", "root"]):
            files = [str(path) for path in Path(place).glob("*.deb")]
            filled = [files[0] if word == "DEB" else word for word in command]
            done = subprocess.run(filled, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or "no reason given").splitlines()[-1]
                raise UserError(f"{package} could not be fetched", got=last, do=f"try `apt-get update`, or {OWN}")
        found = sorted(path for path in Path(place, "root").rglob("*.html") if not path.is_symlink())
        return [path.read_text(encoding="utf-8", errors="replace") for path in found]


def text_of_html(page: str) -> str:
    """What a browser would show, a line for each block; preformatted text keeps its lines."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = [line.rstrip() for line in "".join(reader.parts).splitlines()]
    return "\n".join(line for line in lines if line.strip()) + "\n"


def cut(text: str) -> list[str]:
    """The text in documents of about DOCUMENT characters, cut between lines."""
    documents, begun, size = [], [], 0
    for line in text.splitlines(keepends=True):
        begun.append(line)
        size += len(line)
        if size >= DOCUMENT:
            documents.append("".join(begun))
            begun, size = [], 0
    return [*documents, "".join(begun)] if size else documents


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = self.preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.silent += tag in SILENT
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in SILENT
        self.preformatted -= tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.preformatted else " ".join(f"x{data}x".split())[1:-1])
