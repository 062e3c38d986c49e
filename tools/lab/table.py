#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""table.py: stock against patched, from what measure.sh left.

  table.py --list FILE --build DIR --json OUT

Prints two tables: page tables left after everything was unplugged and the cost of
a block (plug_unplug), and what discards cost that free nothing (pt_reclaim_cost).
Page tables are VmPTE over what it was before the first touch, in kB; "needed" is
what plug_unplug computes for what is still plugged, at all levels.  Costs are guest
instructions (QEMU -icount).  Writes the figures of both kernels to OUT.  Exit status 1
when contents were wrong.
"""
import argparse
import json
import sys

from figures import ratio, read_list, tables_left, tables_needed


def print_scenarios(scenarios):
    print("After everything was unplugged: page tables left (kB), and guest instructions\n"
          "for the discard of one block\n")
    print(f"{'scenario':<42} {'stock':>8} {'patched':>8} {'needed':>7} {'ratio':>6}"
          f" {'insn stock':>10} {'patched':>9} {'ratio':>6}")
    for s in scenarios:
        old, new = tables_left(s, "stock"), tables_left(s, "patched")
        cost = [s.median(k, "discard_cost") for k in ("stock", "patched")]
        print(f"{s.label:<42} {old:>8.0f} {new:>8.0f} {tables_needed(s):>7.0f}"
              f" {ratio(new, old):>6} {cost[0]:>10.0f} {cost[1]:>9.0f}"
              f" {ratio(cost[1], cost[0]):>6}")


def print_costs(scenarios):
    print("\nOperations that can free no table (survivor … relay-mremap: ever harder to see),\n"
          "and page faults: guest instructions for each\n")
    print(f"{'pattern':<16} {'stock':>9} {'patched':>9} {'more':>8}  goal")
    for s in scenarios:
        old, new = (s.median(k, "op_cost") for k in ("stock", "patched"))
        more, goal = 100 * (new / old - 1), s.config("goal_percent")
        print(f"{s.label:<16} {old:>9.1f} {new:>9.1f} {more:>+7.2f}%"
              f"  at most {goal} %: {'met' if more <= goal else 'MISSED'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", required=True)
    parser.add_argument("--build", required=True)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    scenarios = read_list(args.list, args.build)
    wrong = [s.label for s in scenarios.values() if s.wrong()]
    if wrong:
        sys.exit(f"error: wrong contents in {', '.join(wrong)}")
    have = [s for s in scenarios.values() if s.names()]
    print_scenarios([s for s in have if "left_kb" in s.names()])
    print_costs([s for s in have if s.config("goal_percent") is not None])
    for s in scenarios.values():
        if not s.names():
            print(f"{s.label}: skipped")
    with open(args.json, "w", encoding="utf-8") as out:
        json.dump({s.label: s.runs for s in scenarios.values()}, out, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main()
