"""Builds the package from settings.ini, the one source of its metadata."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]


def readme():
    """README.md with its links to files as addresses: the package index knows only the page itself."""
    text, at = (here / "README.md").read_text(encoding="utf-8"), f"{facts['git_url']}/%s/{facts['branch']}/"
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", lambda m: m[1] + at % "raw", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", lambda m: m[1] + at % "blob", text)


def needs(name):
    return facts[name].split()


extras = {name: needs(f"{name}_requirements") for name in ("demos", "trackers", "course")}
extras["dev"] = extras["course"] + needs("dev_requirements")

setup(
    name=facts["pip_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=facts["author"],
    url=facts["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=facts["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={facts['min_python']}",
    install_requires=needs("requirements"),
    extras_require=extras,
    packages=[facts["lib_path"]],
    package_data={facts["lib_path"]: ["weights/**/*", "measured/*.json"]},
    entry_points={"console_scripts": needs("console_scripts")},
    zip_safe=False,
)
