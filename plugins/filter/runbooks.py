"""Filter for the runbooks: Markdown files of one folder, as the HTML pages that people read beside the alerts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

#: The page that lists all others. Web servers show it for the folder, as Git forges show its source.
INDEX, INDEX_SOURCE = "index.html", "README.md"
#: How a runbook begins: the alert that it is for, how urgent it is, and when it fires.
BEGINNING = re.compile(r"\A# (?P<title>.+)\n+(?:Severity: (?P<severity>\w+)\. (?P<summary>.+)\n)?")
#: A link to another runbook, and maybe to a heading in it.
SOURCE_LINK = re.compile(r"(?P<name>\w+)\.md(?P<heading>#.*)?")
# HTML in a runbook is shown as text, and links to scripts are none.
MARKDOWN = MarkdownIt("commonmark", {"html": False})


class RunbookError(Exception):
    """A runbook cannot be rendered; the message names it and what is wrong."""


def tokens_of(tokens: list[Token]) -> Iterator[Token]:
    """Yield tokens and those inside them."""
    for token in tokens:
        yield token
        yield from tokens_of(token.children or [])


def rendered(source: Path, sources: set[str]) -> dict[str, Any]:
    """Return a runbook: title, severity, summary and body, the last as HTML.

    Raises:
        RunbookError: if it has no title, or links to a runbook that does not exist.
    """
    text = source.read_text(encoding="utf-8")
    beginning = BEGINNING.match(text)
    if not beginning:
        raise RunbookError(f"{source} does not begin with a title (# …)")
    tokens = MARKDOWN.parse(text[beginning.end() :])
    for token in tokens_of(tokens):
        if token.type == "link_open" and (link := SOURCE_LINK.fullmatch(str(token.attrGet("href")))):
            if link["name"] + ".md" not in sources:
                raise RunbookError(f"{source} links to {link['name']}.md, which does not exist")
            token.attrSet("href", page_name(link["name"] + ".md") + (link["heading"] or ""))
    body = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    summary = MARKDOWN.renderInline(beginning["summary"] or "")
    return {**beginning.groupdict(), "summary": Markup(summary), "body": Markup(body), "page": page_name(source.name)}  # noqa: S704


def page_name(source: str) -> str:
    """Return the name of the page for a source's name."""
    return INDEX if source == INDEX_SOURCE else source.removesuffix(".md") + ".html"


def runbook_pages(folder: str, template: str, site: str) -> dict[str, str]:
    """Return the pages for all runbooks of a folder, by file name; README.md becomes the index.

    Args:
        folder: Folder on this machine with the sources, <alert>.md.
        template: Jinja template of a page; it gets `site`, `runbook` and, for the index only, `runbooks`.
        site: What the pages call the site.

    Raises:
        RunbookError: if the folder has no README.md, or a runbook cannot be rendered.
    """
    sources = {source.name: source for source in sorted(Path(folder).glob("*.md"))}
    if INDEX_SOURCE not in sources:
        raise RunbookError(f"{folder} has no {INDEX_SOURCE}")
    found = {name: rendered(source, set(sources)) for name, source in sources.items()}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(template)
    others = [runbook for name, runbook in found.items() if name != INDEX_SOURCE]
    return {
        runbook["page"]: page.render(site=site, runbook=runbook, runbooks=others if name == INDEX_SOURCE else []) + "\n"
        for name, runbook in found.items()
    }


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"runbook_pages": runbook_pages}
