"""Write tests/oldest.txt: settings.ini's lower bounds as exact versions, for `make test CONSTRAINTS=tests/oldest.txt`."""

from notebooks import ROOT, settings


def oldest() -> str:
    """The constraints file's text, one package a line; ranges without a lower bound don't occur in `requirements`."""
    head = "# Made by `make oldest` from settings.ini: the oldest versions that the tests run on."
    return "\n".join([head, *settings()["requirements"].replace(">=", "==").split()]) + "\n"


if __name__ == "__main__":
    (ROOT / "tests" / "oldest.txt").write_text(oldest())
