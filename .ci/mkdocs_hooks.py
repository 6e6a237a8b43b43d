"""Pages of the site: README.md is its home, and links to the project's files lead to copies of them.

So all pages can link as they must to be read in the repository, and a link to what does not exist ends the build.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
FIRST = [
    "index.md",
    "training.md",
    "data.md",
    "evaluation.md",
    "serving.md",
    "safety.md",
    "gpus.md",
    "multihost.md",
    "tpu.md",
    "reliability.md",
    "changing.md",
]
LAST = ["troubleshooting.md", "glossary.md", "design.md", "log.md", "api.md", "CONTRIBUTING.md", "CHANGELOG.md"]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")  # of a text or a picture, without its anchor


def on_config(config: Any) -> None:
    """Navigation: known pages in their order, others between them."""
    found = {path.name for path in (ROOT / "docs").glob("*.md")} | set(PAGES.values())
    others = sorted(found - {*FIRST, *LAST})
    config.nav = [page for page in [*FIRST, *others, *LAST] if page in found]


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside of docs/, and every file that a page links to."""
    todo = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in todo:  # which grows: a page that is linked to links on
        text = (ROOT / path).read_text()
        if path in PAGES:
            files.append(File.generated(config, PAGES[path], content=text))
        for target in (_target(path, link) for _, link in LINK.findall(text)):
            if _uri(target) not in files.src_uris and (ROOT / target).is_file() and target not in PAGES:
                files.append(File.generated(config, _uri(target), abs_src_path=str(ROOT / target)))
                todo += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between the repository's files into links between the site's."""
    uri = page.file.src_uri
    path = next((path for path, name in PAGES.items() if name == uri), f"docs/{uri}")
    if uri.startswith("source/"):
        path = uri.removeprefix("source/")
    here = os.path.dirname(uri)
    return LINK.sub(lambda link: link[1] + os.path.relpath(_uri(_target(path, link[2])), here or "."), markdown)


def _target(path: str, link: str) -> str:
    """What a link on a page means, from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(path), link))


def _uri(target: str) -> str:
    """Where the site has it."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}"
