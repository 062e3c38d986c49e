#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""e2e_table.py: stock against patched, from what guest/e2e.py recorded.

  e2e_table.py --stock DIR --stock-status N --patched DIR --patched-status N
               --qemu TEXT --json OUT SCENARIO...

Prints four tables and a line for each check; the last line is "N passed, N
failed, N skipped".  Page tables are in kB, over what they were when the guest had
booted and nothing was plugged yet: "filled" when the guest had filled its memory
the last time, "left" after the last unplug, report or inflation, before the scan.
Where each figure comes from: guest/e2e.py.  The status is that of vm.sh: 99 says
that the kernel under test complained.  Exit status 1 when a check failed or a
scenario has no result; no figure fails a run.
"""
import argparse
import json
import os
import statistics
import sys

from figures import ratio

KINDS = ("stock", "patched")
FIGURES = (("VmPTE", "vmpte"), ("SecPageTables", "sec_page_tables"),
           ("PageTables", "page_tables"), ("second VmPTE", "second_vmpte"))
EMPTIED = ("unplugged", "reported", "inflated")
LATENCIES = (("plug", "plug_seconds"), ("unplug", "unplug_seconds"),
             ("unplug after cancel", "unplug_seconds_after_cancel"))


def load(directory, scenarios):
    """The result of each scenario: of the run that went well, else of the last that did not."""
    found = {}
    for name in scenarios:
        for suffix in (".json", ".failed.json"):
            path = os.path.join(directory, name + suffix)
            if name not in found and os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    found[name] = json.load(file)
    return found


def last_step(result, *names):
    steps = [step for step in result["steps"] if step["step"].split()[0] in names]
    return steps[-1] if steps else None


def over_boot(result, step, figure):
    """A figure of a step over what it was when the guest had booted, or None."""
    if not step or figure not in step:
        return None
    return step[figure] - result["steps"][0][figure]


def cell(value):
    return "-" if value is None else value


def pairs(results, scenarios):
    """The scenarios of which there is something in both kernels."""
    for name in scenarios:
        both = [results[kind].get(name) for kind in KINDS]
        if all(result and result["steps"] for result in both):
            yield both


def print_left(results, scenarios):
    print("Page tables that the guest's memory leaves behind when it is gone (kB)\n")
    print(f"{'scenario':<48} {'figure':<14} {'filled':>8} {'left: stock':>14} {'patched':>8}"
          f" {'ratio':>6}")
    for both in pairs(results, scenarios):
        what = both[0]["what"]
        for title, figure in FIGURES:
            full = over_boot(both[0], last_step(both[0], "filled"), figure)
            left = [over_boot(result, last_step(result, *EMPTIED), figure) for result in both]
            if full is None and left == [None, None]:
                continue
            print(f"{what:<48} {title:<14} {cell(full):>8} {cell(left[0]):>14}"
                  f" {cell(left[1]):>8} {'-' if None in left else ratio(left[1], left[0]):>6}")
            what = ""


def seconds(result, name):
    found = [step[name] for step in result["steps"] if name in step]
    return f"{statistics.median(found):.2f}" if found else None


def print_latencies(results, scenarios):
    print("\nSeconds from the request until the device had the size (median; unplug: half of\n"
          "the memory a time)\n")
    print(f"{'scenario':<48} {'':<20} {'stock':>8} {'patched':>8}")
    for both in pairs(results, scenarios):
        what = both[0]["what"]
        rows = [(title, [seconds(result, name) for result in both]) for title, name in LATENCIES]
        for title, values in rows:
            if values != [None, None]:
                print(f"{what:<48} {title:<20} {cell(values[0]):>8} {cell(values[1]):>8}")
                what = ""


def print_scans(results, scenarios):
    print("\nUnplugged memory read through /proc/PID/mem, as gcore would: VmPTE and RSS of QEMU\n"
          "before, after, and after a manager asked for page tables that hold no data (kB)\n")
    print(f"{'scenario':<48} {'kernel':<8} {'VmPTE':>6} {'after':>6} {'asked':>6} {'RSS':>8}"
          f" {'after':>8} {'asked':>8}  in a core dump")
    for both in pairs(results, scenarios):
        what = both[0]["what"]
        for kind, result in zip(KINDS, both):
            steps = [last_step(result, *EMPTIED), last_step(result, "scanned"),
                     last_step(result, "trimmed")]
            if not all(steps):
                continue
            pte = " ".join(f"{step['vmpte']:>6}" for step in steps)
            rss = " ".join(f"{step['rss']:>8}" for step in steps)
            dump = "no: MADV_DONTDUMP" if result["notes"]["dontdump"] else "yes"
            print(f"{what:<48} {kind:<8} {pte} {rss}  {dump}")
            what = ""


def print_hostile(results):
    both = [results[kind].get("hostile") for kind in KINDS]
    if not any(result and result["notes"].get("hostile") for result in both):
        return
    print("\nA guest that touches what it has unplugged: RSS of QEMU (kB) when it had filled\n"
          "what it plugged, had given back all blocks but one, and had touched those again\n")
    print(f"{'the device is kept in':<48} {'kernel':<8} {'filled':>8} {'unplugged':>9} {'touched':>8}"
          f" {'pages back':>10} {'exits':>6}  guest")
    for kind, result in zip(KINDS, both):
        for row in result["notes"].get("hostile", []) if result else []:
            rss = "{:>8} {:>9} {:>8}".format(*row["rss"])
            print(f"{row['memslots']:<48} {kind:<8} {rss} {row['pages']:>10}"
                  f" {cell(row['unplugged_exits']):>6}"
                  f"  {'stopped' if row['stopped'] else 'goes on'}")


def verdict(results, statuses, scenarios):
    """[(passed, text)]: what was checked, and what should have been."""
    lines = []
    for kind in KINDS:
        for name in scenarios:
            result = results[kind].get(name)
            if not result:
                lines.append((False, f"{kind} {name}: finished: no result"))
                continue
            for check in result["checks"]:
                why = f": {check['why']}" if check["why"] else ""
                lines.append((check["passed"], f"{kind} {name}: {check['what']}{why}"))
        lines.append((statuses[kind] != 99, f"{kind}: the kernel had nothing to complain of"))
        if statuses[kind] not in (0, 1, 99):
            lines.append((False, f"{kind}: the run ended with status {statuses[kind]}"))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", required=True)
        parser.add_argument(f"--{kind}-status", type=int, required=True)
    parser.add_argument("--qemu", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("scenarios", nargs="+")
    args = parser.parse_args()
    results = {kind: load(getattr(args, kind), args.scenarios) for kind in KINDS}
    statuses = {kind: getattr(args, f"{kind}_status") for kind in KINDS}
    with open(args.json, "w", encoding="utf-8") as out:
        json.dump({"qemu": args.qemu, **results}, out, indent=1)
        out.write("\n")
    print(f"Guests of {args.qemu}\n")
    print_left(results, args.scenarios)
    print_latencies(results, args.scenarios)
    print_scans(results, args.scenarios)
    print_hostile(results)
    print()
    lines = verdict(results, statuses, args.scenarios)
    for n, (passed, text) in enumerate(lines, 1):
        print(f"{'ok' if passed else 'not ok'} {n} - {text}")
    failed = sum(not passed for passed, text in lines)
    print(f"{len(lines) - failed} passed, {failed} failed, 0 skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
