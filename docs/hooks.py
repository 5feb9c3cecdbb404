"""Hooks of the site (mkdocs.yml): pages that stand outside of docs/, and links to files of the repository.

README.md, CHANGELOG.md and CONTRIBUTING.md are pages of the site without a copy in docs/. Their links, and those of the
pages in docs/, are written for a code host, where every file of the repository can be opened:

    link to                               in the site
    README.md, CHANGELOG.md, ...          its page (PAGES)
    a page or another file below docs/    the same
    another text file                     a page below source/ that shows it, and is not searched
    another file                          a copy below source/
    a folder                              its name, because a site has no listing

A link whose text is the name of a page has the page's or the section's title instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
SOURCE = "source"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".lock": "text", ".txt": "text"}
# Code, in which brackets are no links, or a link or an image: its text and its target.
LINK = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`))"
    r"|(?P<text>!?\[(?:[^\[\]`]|`[^`]*`)*\])\((?P<target>[^()\s]+)\)",
    re.DOTALL | re.MULTILINE,
)

SLUG = slugify(case="lower")  # as in mkdocs.yml
NAME = re.compile(r"\[[\w./-]+\.md\]")  # the text of a link that is the name of a page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add PAGES, and a page or a copy for every file outside of docs/ that a page links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked.update(path for path in _targets(file.content_string, origin(file.src_uri)) if _is_source(path))
    for path in sorted(linked):
        if PurePosixPath(path).suffix in LANGUAGES:
            text = listing(path, (ROOT / path).read_text(encoding="utf-8"))
            files.append(File.generated(config, source_uri(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        else:
            files.append(File.generated(config, source_uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """The page with links for the site; a listing has none."""
    uri = page.file.src_uri
    return markdown if uri.startswith(f"{SOURCE}/") else relinked(markdown, origin(uri), uri)


def origin(uri: str) -> str:
    """The file of the repository that a page shows."""
    return {page: name for name, page in PAGES.items()}.get(uri, f"{DOCS}/{uri}")


def relinked(markdown: str, path: str, uri: str) -> str:
    """The text of the repository's file `path` with links as the page `uri` needs them; broken ones are left alone."""

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or not target or _is_elsewhere(target):
            return match[0]
        name, hash_, anchor = target.partition("#")
        found = _resolved(name, path)
        if found is None:
            return match[0]
        if (ROOT / found).is_dir():
            return match["text"][1:-1]
        text = f"[{_title(found, anchor)}]" if NAME.fullmatch(match["text"]) else match["text"]
        return f"{text}({_relative(_page_of(found), uri)}{hash_}{anchor})"

    return LINK.sub(link, markdown)


def listing(path: str, text: str) -> str:
    """The page of a text file."""
    fence = max(re.findall(r"`{3,}", text), default="``") + "`"
    language = LANGUAGES[PurePosixPath(path).suffix]
    # `exclude` keeps the page out of the search, where the whole code would hide the documentation.
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n{fence}{language}\n{text}\n{fence}\n"


def source_uri(path: str) -> str:
    """The page, or the copy, of a file outside of docs/."""
    return f"{SOURCE}/{path}" + (".md" if PurePosixPath(path).suffix in LANGUAGES else "")


def _targets(markdown: str, path: str) -> Iterable[str]:
    """The repository's files to which a file links."""
    for match in LINK.finditer(markdown):
        target = match["target"]
        if target and not _is_elsewhere(target) and (found := _resolved(target.partition("#")[0], path)):
            yield found


def _is_elsewhere(target: str) -> bool:
    """Whether a link leads to another site, or to an anchor of its own page."""
    return target.startswith("#") or bool(re.match(r"[a-z]+:", target))


def _resolved(name: str, path: str) -> str | None:
    """The repository's file or folder that a link in the file `path` means; None if there is none."""
    found = os.path.normpath(PurePosixPath(path).parent / name)
    return found if not found.startswith("..") and (ROOT / found).exists() else None


def _is_source(path: str) -> bool:
    return path not in PAGES and not path.startswith(f"{DOCS}/") and (ROOT / path).is_file()


def _page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else source_uri(path)


def _title(path: str, anchor: str) -> str:
    """The heading of a page at an anchor, or the first one; its name if it has none."""
    headings = re.findall(r"^#+ (.+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    by_anchor = {SLUG(heading.replace("`", ""), "-"): heading for heading in headings}
    return by_anchor.get(anchor) or next(iter(headings), path)


def _relative(target: str, uri: str) -> str:
    return os.path.relpath(target, PurePosixPath(uri).parent)
