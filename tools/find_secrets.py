"""Look for tokens, keys and paths of somebody's machine in every file that is, or could be, committed."""

import re
import subprocess
import sys
from pathlib import Path

from notebooks import ROOT

# The patterns are written so that none of them finds itself in this file.
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an API key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a Weights & Biases key": r"(?i)wandb[\w ]*(?:key|login)\W{1,6}[0-9a-f]{40}\b",
    "a password in an address": r"\b[a-z]{3,6}://[^\s/:@\"'{}$<>]+:[^\s/:@\"'{}$<>]{3,}@(?!127\.|localhost|\w*\.?example)",
    "a written-out secret": r"(?i)\b(?:api_?key|secret|token|passw(?:or)?d)[\"']?\s*[=:]\s*\\?[\"'][A-Za-z0-9_\-/+]{16,}\\?[\"']",
}
PATHS = {
    "a path of a home folder": r"(?<![\w.])/(?:h[o]me|U[s]ers)/[A-Za-z][\w.-]*/|(?<![\w.])/r[o]ot/\w|\b[A-Z]:\\+U[s]ers\\+\w",
    "a path of a temporary folder": r"/t[m]p/(?:tmp\w{6,}|ipykernel_\d+)|/var/f[o]lders/\w",
}
BINARY = {".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".ico", ".wav", ".mp3", ".gz", ".zip", ".woff2"}


def files() -> list[Path]:
    """Every file that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def without_pictures(text: str) -> str:
    """A notebook's text without base64 data, in which anything can be found."""
    return re.sub(r"[A-Za-z0-9+/=]{200,}(?:\\n)?", "", text)


def scan(text: str, patterns: dict[str, str]) -> list[tuple[int, str]]:
    """What a text must not hold, as (line, kind); what was found is not repeated."""
    found = []
    for kind, pattern in patterns.items():
        found += [(text.count("\n", 0, m.start()) + 1, kind) for m in re.finditer(pattern, text)]
    return sorted(found)


def main():
    """Scan all files; list what was found and exit with 1 if anything was."""
    here = {str(ROOT.parent), str(Path.home())} - {"/", "/t" + "mp"}
    patterns = (
        SECRETS | PATHS | {"a path of this machine": "|".join(rf"(?<![\w.]){re.escape(p)}/\w" for p in sorted(here))}
    )
    found, count = [], 0
    for path in files():
        if path.suffix in BINARY:
            continue
        count += 1
        text = without_pictures(path.read_text(encoding="utf-8", errors="replace"))
        found += [f"{path.relative_to(ROOT)}:{line}: {kind}" for line, kind in scan(text, patterns)]
    if found:
        sys.exit("\n".join(found) + f"\n{len(found)} secrets or paths of a machine")
    print(f"no secrets and no paths of a machine in {count} files")


if __name__ == "__main__":
    main()
