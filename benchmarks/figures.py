"""What the long runs share: their command line, and the figures of an earlier run that they go on with."""

import argparse
import time

from dm_course.settings import choose
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


def run_parts(doc, parts, new_bench, **numbers):
    """Measure the parts that the command line names, or all; each finds out itself whether its figures are there.

    `doc` is shown by --help, `parts` are functions of the bench by name, `new_bench` makes it of the arguments, and
    `numbers` are further options: name = (usual value, help).
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a part to measure again; may be given several times")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    for name, (value, text) in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value})")
    args = parser.parse_args()
    if args.list:
        print("\n".join(parts))
        return
    wanted = [choose(name, parts, "part") for name in args.only or parts]
    bench = new_bench(args)
    for name in wanted:
        begin = time.perf_counter()
        parts[name](bench)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
