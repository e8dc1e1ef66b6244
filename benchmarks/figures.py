"""Go on with the figures of an earlier run, where they were made in the same way."""

from dm_course.zoo import measured


def resumed(name, same, only=None):
    """The figures so far of the run `name`, with `same`, which says how they are made; figures made otherwise are void.

    `only` names the parts that are asked for: one part cannot be measured again in another way than the others, and
    then this stops the program with a message.
    """
    try:
        figures = measured(name)
    except ValueError:  # there are none yet
        figures = {}
    if any(figures.get(k) != v for k, v in same.items()):
        if only and figures:
            raise SystemExit(f"The other figures were made by {figures['command']}: repeat it as it was, or all of it.")
        figures = {}
    return figures | same
