"""Write README.md from nbs/index.ipynb: the same text, links turned to the repository's root, outputs as they are stored."""

import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from notebooks import NBS, ROOT, directives, read

PICTURES = "nbs/images"  # where pictures that the index's own cells made are kept


class ForReadme(Preprocessor):
    """Drop what a page does not show, and turn links: the index lies in nbs/, the page in the folder above."""

    def preprocess(self, nb, resources):
        """Returns the notebook as the page shows it."""
        nb.metadata["language_info"] = {"name": "python"}
        nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not {"hide", "default_exp"} & directives(c).keys()]
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = from_root(cell.source)
            elif cell.cell_type == "code":
                said = directives(cell)
                cell.source = re.sub(r"^\s*#\s?\|.*\n?", "", cell.source, flags=re.M).strip("\n")
                cell.outputs = [] if said.get("output", "").lower() == "false" else cell.outputs
                cell.source = "" if said.get("echo", "").lower() == "false" else cell.source
        return nb, resources


def from_root(text: str) -> str:
    """Relative links of a text in nbs/ as they read from the root."""

    def turn(match):
        before, link = match[1], match[2]
        if re.match(r"[a-z]+:|#|/", link):
            return match[0]
        target = (NBS / link.partition("#")[0]).resolve()
        anchor = "#" + link.partition("#")[2] if "#" in link else ""
        return before + target.relative_to(ROOT).as_posix() + anchor

    return re.sub(r"""(\]\(\s*|(?:src|href)=["'])([^)"'\s]+)""", turn, text)


def readme() -> tuple[str, dict[str, bytes]]:
    """The page's text and the pictures that belong to it, by their path."""
    exporter = MarkdownExporter()  # it takes pictures out into files by itself
    exporter.register_preprocessor(ForReadme(), enabled=True)
    resources = {"unique_key": "readme", "output_files_dir": PICTURES}
    text, resources = exporter.from_notebook_node(read(NBS / "index.ipynb"), resources)
    text = re.sub(r"```python\s*```", "", text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text, resources["outputs"]


def main():
    """Write README.md and its pictures; pictures that it no longer shows go."""
    text, pictures = readme()
    for old in (ROOT / PICTURES).glob("readme_*"):
        if old.relative_to(ROOT).as_posix() not in pictures:
            old.unlink()
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        Path(ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
