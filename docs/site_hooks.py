"""What mkdocs.yml needs beside stock plug-ins: pages that link to files of the repository, and roles in docstrings.

Files that pages link to and that are not in docs/ (CONTRIBUTING.md, result files) become part of the site, in the
folder ``repository``, so that the links of a clone work there. Roles of docstrings (``:class:`Name```) become code.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]  # are in the navigation
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to, and those that these link to."""
    queue = [*FIRST]
    for file in files.documentation_pages():
        queue += _targets(f"docs/{file.src_uri}", file.content_string)
    for path in queue:  # grows
        uri = f"repository/{path}"
        if not path.startswith("docs/") and (ROOT / path).is_file() and uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                queue += _targets(path, (ROOT / path).read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that lead into or out of docs/ to where the site has the files."""
    source = _place(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if not (ROOT / target).is_file():  # no link, or one that MkDocs complains of
            return link[0]
        target = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return f"{link[1]}{posixpath.relpath(target, folder or '.')}{link[3]}"

    return LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the roles of docstrings as code."""
    return ROLE.sub(lambda role: f"<code>{role[1].removeprefix('featsharp.')}</code>", html)


def _place(uri: str) -> str:
    """Return where the repository has a file of the site."""
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _targets(source: str, text: str) -> list[str]:
    return [posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2])) for link in LINK.finditer(text)]
