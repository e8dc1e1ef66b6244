"""Check the links, anchors and pictures of notebooks and Markdown files. Addresses elsewhere are not fetched."""

import base64
import io
import re
import sys
import urllib.parse
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from notebooks import ROOT, all_notebooks, badge_urls, headings, lessons, place, read, settings
from PIL import Image


class Page(HTMLParser):
    """The links, picture sources and anchors of an HTML text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collect what a tag refers to and what it can be referred to by."""
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "source", "video", "audio") and "src" in attrs:
            self.images.append(attrs["src"] or "")


def texts(path: Path) -> list[tuple[str, str]]:
    """The Markdown texts of a file, each with where it stands."""
    if path.suffix != ".ipynb":
        return [("", re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.S))]  # a card's facts
    nb = read(path)
    return [(place(nb, i), c.source) for i, c in enumerate(nb.cells) if c.cell_type == "markdown"]


@cache
def anchors(path: Path) -> set[str]:
    """What can stand after # in a link to a file: as Jupyter writes anchors, as GitHub does, and ids set by hand."""
    found = set()
    for _, text in texts(path):
        found |= Page(markdown2html(text)).anchors
        for heading in headings(text):
            plain = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            found |= {plain.replace(" ", "-"), re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")}
    return found


def inside(link: str) -> Path | None:
    """The file of this repository that an absolute address (a badge's, say) points to, or None for one elsewhere."""
    s = settings()
    here = re.escape(f"{s['user']}/{s['repo']}")
    match = re.search(rf"github(?:usercontent)?(?:\.com)?/{here}/(?:(?:blob|raw|tree)/)?{s['branch']}/([^?#]+)", link)
    return ROOT / urllib.parse.unquote(match[1]) if match else None


def problem(link: str, path: Path) -> str | None:
    """What is wrong with a link that stands in the file `path`, or None."""
    if re.match(r"(https?:)?//", link):
        target = inside(link)
        return f"there is no {target.relative_to(ROOT)} here" if target and not target.exists() else None
    if re.match(r"(mailto|data):", link):
        return None
    if re.match(r"[a-z]+:", link) or link.startswith("/"):
        return "neither a relative link nor one to the web"
    file, _, anchor = urllib.parse.unquote(link).partition("#")
    target = (path.parent / file).resolve() if file else path
    if not target.exists():
        return f"{file} does not exist"
    if not target.is_relative_to(ROOT):
        return f"{file} lies outside of the repository"
    if anchor and target.suffix in (".ipynb", ".md") and anchor not in anchors(target):
        return f"{target.name} has no heading for #{anchor}"
    return None


def check_texts(path: Path) -> list[str]:
    """The broken links and pictures of a file's Markdown."""
    found = []
    for where, text in texts(path):
        page = Page(markdown2html(text))
        for link in page.links + page.images:
            if wrong := problem(link, path):
                found.append(f"{path.relative_to(ROOT)} {where}: {link}: {wrong}".replace(" : ", ": "))
        if left := re.findall(r"!\[[^\]]*\]\(\s*\)|\]\(\s*\)", text):
            found.append(f"{path.relative_to(ROOT)} {where}: {left[0]} leads nowhere")
    return found


def check_outputs(path: Path) -> list[str]:
    """The pictures of a notebook that don't decode, and those of its rendered page that would not show."""
    found, nb = [], read(path)
    for i, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & output.get("data", {}).keys():
                try:
                    Image.open(io.BytesIO(base64.b64decode(output["data"][kind]))).load()
                except Exception as error:  # whatever the reason, the picture can't be seen
                    found.append(f"{path.relative_to(ROOT)} {place(nb, i)}: a broken picture ({error})")
    exporter = HTMLExporter(embed_images=True)
    try:
        rendered = exporter.from_notebook_node(nb, {"metadata": {"name": path.stem, "path": str(path.parent)}})[0]
    except OSError as error:  # an embedded picture that is missing
        return found + [f"{path.relative_to(ROOT)}: does not render ({error})"]
    for source in Page(rendered).images:
        if not re.match(r"data:[a-z]+/[\w.+-]+;base64,\S|https?://", source):
            found.append(f"{path.relative_to(ROOT)}: the rendered page misses the picture {source[:80]!r}")
    return found


def check_badges(path: Path) -> list[str]:
    """The badges of a lesson that lead elsewhere than settings.ini says."""
    text = "\n".join(t for _, t in texts(path))
    return [f"{path.relative_to(ROOT)}: no {k} badge to {u}" for k, u in badge_urls(path).items() if u not in text]


def main():
    """Check everything; list what is broken and exit with 1 if anything is."""
    notebooks = all_notebooks()
    markdown = [p for p in [*ROOT.glob("*.md"), *ROOT.glob("nbs/**/*.md"), *ROOT.glob("dm_course/weights/*/*.md")]]
    found = [m for path in [*notebooks, *markdown] for m in check_texts(path)]
    found += [m for path in notebooks for m in check_outputs(path)]
    found += [m for path in lessons() for m in check_badges(path)]
    if found:
        sys.exit("\n".join(found) + f"\n{len(found)} broken links, anchors or pictures")
    print(f"links, anchors and pictures hold in {len(notebooks)} notebooks and {len(markdown)} Markdown files")


if __name__ == "__main__":
    main()
