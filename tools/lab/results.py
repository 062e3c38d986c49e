#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""results.py: turn what the test programs printed into a verdict.

  results.py --tests FILE --ours DIR [--stock DIR... --patched DIR... [--differing]]

DIR has the outputs of one kernel, n.tap and n.status for the n-th line of FILE.
A case of ours passes when it is ok.  A case of a stock program passes when the
patched kernel gives what the stock kernel gives, and fails when it does not, or
when one of them has no such case.  A program's exit status is a case "exit";
in the debug kernel (DIR of --ours) stock programs must end by themselves.
Prints what failed, for a case of ours with what its program said of it (the last
20 lines), and, last, "N passed, N failed, N skipped".

Some stock tests fail now and then on any kernel.  Where the first run of a case
differs, and its program ran again (further DIRs of --stock and --patched), it
fails when what the patched kernel gives most often is something that the stock
kernel never gave; what varies is printed either way.  --differing prints the
numbers of the programs that are worth running again, and nothing else.

Exit status: 0 nothing failed, 1 something did.
"""
import argparse
import re
import sys
from collections import OrderedDict
from pathlib import Path

# Where our own tests run, and what the debug kernel is booted with there.
OURS = {"ours": "", "beside": "", "shadow": " (kvm.tdp_mmu=0)", "nonpt": " (kvm_amd.npt=0)"}
CASE = re.compile(r"^\s*(not ok|ok)\s+\d+\s*-?\s*(.*?)\s*(#\s*(SKIP|XFAIL|XPASS|TODO)\b.*)?$",
                  re.I)


# Stock cases that come out either way on a stock kernel, and why.  They are not compared,
# nor is the exit status of a run in which one was not ok.
VARIES = {
    # khugepaged, which looks every 10 ms, may collapse what the test has just populated
    # and is about to have swapped out: 4 of 8 runs on stock were not ok, 3 of 8 on patched.
    "mm/khugepaged": ("collapse_max_ptes_swap",),
}
NOT_COMPARED = ("not run", "varies")

# Not a case, but what a program that bailed out has among them.
BAILED = "Bail out!"


def read_tests(path):
    """[(number, where, label)] in the order of the file, numbered from 1."""
    tests = []
    for line in Path(path).read_text().splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            if words[0] not in (*OURS, "stock", "both", "three"):
                sys.exit(f"error: {path}: nobody runs what is to run in '{words[0]}'")
            tests.append((len(tests) + 1, words[0], " ".join(words[2:])))
    return tests


def normal(name):
    """A case's name without what differs from run to run."""
    name = re.sub(r"0x[0-9a-f]+", "ADDRESS", name)
    name = re.sub(r"\b\d+(\.\d+)? ?(ns|us|ms|s|MiB/s|GiB/s|pages)\b", r"N \2", name)
    name = re.sub(r"(expected|actual|rate|time|pid)\s*[:=]?\s*-?\d[\d.]*", r"\1 N", name, flags=re.I)
    name = re.sub(r"(extra (?:pages|thread faults)) \d+(?: \([\d.]+%\))?", r"\1 N", name, flags=re.I)
    return re.sub(r"[\t:]+", " ", name).strip() or "unnamed"


def cases(out, number, said=None):
    """Ordered {case: result} of one program; results ok, not ok, skip.

    said: a dict to fill, {case: the lines since the case before it}.
    The exit's are those behind the last case: an assertion's, if it ended there.
    """
    found = OrderedDict()
    tap = Path(out) / f"{number}.tap"
    text = tap.read_bytes().decode(errors="replace") if tap.exists() else ""
    since = []
    for line in text.splitlines():
        match = CASE.match(line)
        if line.startswith("Bail out!"):
            found[BAILED] = "yes"
        if not match:
            since.append(line)
            continue
        result = match.group(1).lower()
        if match.group(4) and match.group(4).upper() == "SKIP":
            result = "skip"
        name = base = normal(match.group(2))
        again = 1
        while name in found:
            again += 1
            name = f"{base} #{again}"
        found[name] = result
        if said is not None:
            said[name] = since
        since = []
    if said is not None:
        said["exit"] = since
    status = Path(out) / f"{number}.status"
    code = status.read_text().strip() if status.exists() else "never ran"
    found["exit"] = {"0": "ok", "4": "skip"}.get(code, f"not ok ({code})")
    return found


def runs(dirs, number):
    """What cases() gives for the first of dirs, and for those that ran it again."""
    return [cases(out, number) for i, out in enumerate(dirs)
            if i == 0 or (Path(out) / f"{number}.status").exists()]


class Count:
    """Of cases; prints what failed as it goes."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def fail(self, label, case, text):
        self.failed += 1
        print(f"# FAILED {label}: {case}: {text}")

    def good(self, result):
        if result == "skip":
            self.skipped += 1
        else:
            self.passed += 1


def judge_ours(count, label, out, number):
    said = {}
    for case, result in cases(out, number, said).items():
        if result in ("ok", "skip"):
            count.good(result)
            continue
        count.fail(label, case, result)
        for line in said.get(case, [])[-20:]:
            print(f"#   {line.lstrip('# ')}")


def compare(stock, patched, label):
    """(case, stock results, patched results) for each case of any run.

    stock, patched: what cases() gave for each run, in order, equally many.
    """
    names = OrderedDict.fromkeys(case for run in stock + patched for case in run
                                 if case != BAILED)
    stock, patched = ([without_varying(label, with_all(run, names)) for run in runs_of]
                      for runs_of in (stock, patched))
    for case in names:
        yield (case, [run[case] for run in stock], [run[case] for run in patched])


def with_all(run, names):
    """A run with a result for each of the names of cases."""
    absent = "missing"
    if BAILED in run:
        absent = "not run"
        following = [case for case in names if case not in run]
        run = {**run, **dict.fromkeys(following[:1], "not ok")}
    return {case: run.get(case, absent) for case in names}


def without_varying(label, run):
    """A run in which what varies anyway, and what comes of it, is marked."""
    bad = [case for case in VARIES.get(label, ()) if run.get(case, "ok") != "ok"]
    if not bad:
        return run
    marked = {**run, **dict.fromkeys(bad, "varies")}
    if marked.get("exit") == "not ok (1)":
        marked["exit"] = "varies"
    return marked


def judge_stock(count, label, stock, patched):
    for case, old, new in compare(stock, patched, label):
        ran = [result for result in new if result not in NOT_COMPARED]
        usual = max(ran, key=ran.count) if ran else new[0]
        text = f"stock: {', '.join(old)}; patched: {', '.join(new)}"
        if old[0] == new[0]:
            count.good(new[0])
        elif usual in old or usual == "varies":
            count.good(usual)
            print(f"# VARIES {label}: {case}: {text}")
        else:
            count.fail(label, case, text)


def judge_debug(count, label, found):
    if found["exit"] in ("not ok (124)", "not ok (137)", "not ok (never ran)"):
        count.fail(f"{label} (debug kernel)", "exit", found["exit"])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", required=True)
    parser.add_argument("--ours")
    parser.add_argument("--stock", nargs="+", default=[])
    parser.add_argument("--patched", nargs="+", default=[])
    parser.add_argument("--differing", action="store_true")
    args = parser.parse_args()
    if len(args.stock) != len(args.patched):
        parser.error("--stock and --patched want equally many DIRs")
    count = Count()
    for number, where, label in read_tests(args.tests):
        stock = runs(args.stock, number)
        patched = runs(args.patched, number)
        if args.differing:
            if where not in OURS and dict(stock[0]) != dict(patched[0]):
                print(number)
        elif where in OURS:
            judge_ours(count, label + OURS[where], args.ours, number)
        elif stock:
            judge_stock(count, label, stock, patched)
            if where == "both":
                judge_debug(count, label, cases(args.ours, number))
    if args.differing:
        return
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped")
    sys.exit(count.failed > 0)


if __name__ == "__main__":
    main()
