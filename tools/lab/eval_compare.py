#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""eval_compare.py OLD.json NEW.json: did a figure of the patched kernel get worse?

Both files are build/report/results.json of `make eval`, of two revisions.  A figure
is worse when its median rose by more than the spread over the runs, of either file,
and by more than 0.1 percent, to which -icount repeats (QEMU's timer interrupts).
Less is better of every figure but those that the files call neutral.

Exit status: 0 nothing got worse, 1 something did, 2 bad input.
"""
import json
import sys

from figures import Scenario, ratio

LEAST = 0.001


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        scenarios = {}
        for label, entry in data["scenarios"].items():
            scenarios[label] = Scenario(label, entry["when"])
            scenarios[label].runs = entry["runs"]
        return data["neutral"], scenarios
    except (OSError, ValueError, KeyError, TypeError) as bad:
        print(f"error: {path} is not a results.json of make eval: {bad}", file=sys.stderr)
        sys.exit(2)


def changes(old, new, neutral):
    """(label, figure, old median, new median, allowed change) of what both have."""
    for label in old:
        if label not in new:
            continue
        for name in old[label].names():
            if name in neutral or name not in new[label].names():
                continue
            if old[label].unit(name) != new[label].unit(name):
                continue
            before, after = (s[label].median("patched", name) for s in (old, new))
            allowed = max(old[label].spread(name), new[label].spread(name), LEAST)
            yield label, name, before, after, allowed


def main():
    if len(sys.argv) != 3:
        print("error: want two results of make eval: make eval-compare OLD=a.json NEW=b.json",
              file=sys.stderr)
        sys.exit(2)
    neutral, old = read(sys.argv[1])
    _, new = read(sys.argv[2])
    compared = list(changes(old, new, neutral))
    if not compared:
        print("error: the two files have no figure in common", file=sys.stderr)
        sys.exit(2)
    worse = [c for c in compared if c[3] > c[2] * (1 + c[4])]
    for label, name, before, after, allowed in worse:
        print(f"worse: {label}: {name}: {before:.1f} to {after:.1f}, {ratio(after, before)} times"
              f" (spread {100 * allowed:.2f} %)")
    gone = sorted(set(old) - set(new))
    if gone:
        print(f"not measured again: {'; '.join(gone)}")
    better = sum(c[3] < c[2] * (1 - c[4]) for c in compared)
    print(f"{len(compared)} figures compared, {len(worse)} worse, {better} better")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
