# SPDX-License-Identifier: GPL-2.0
"""figures.py: what measure.sh measured, for those who print, plot or compare it.

A scenario has, for each kernel, one object a run; an object's "figures" are
numbers by name.  The unit is in the name: *_kb is kB (1024 bytes) of memory, and
*_cost what an operation costs, in guest instructions (the object's "cost_unit" is
"insn", under QEMU's -icount) or ns.  Less is better of all of them but those that
`neutral` names.
"""
import json
import re
from pathlib import Path

# Said to judge others by: what is needed, or the same in every kernel.
NEUTRAL = ("ideal_left_kb", "ideal_mean_kb", "upper_kb", "vmpte_before_kb", "rss_after_kb",
           "peak_kb", "tables_plugged_kb", "zero_bitmap_cost", "round_cost")


class Scenario:
    """One scenario: runs[kernel] is a list of objects, perf[kernel] counters."""

    def __init__(self, label, when):
        self.label = label
        self.when = when
        self.runs = {"stock": [], "patched": []}
        self.perf = {}

    def skipped(self):
        return any(run.get("skipped") for runs in self.runs.values() for run in runs)

    def wrong(self):
        """Did a run find contents that it did not expect?"""
        return not all(run.get("contents", True) for runs in self.runs.values() for run in runs)

    def names(self):
        """The figures that both kernels have, in order."""
        if self.skipped():
            return []
        stock, patched = (self.runs[k][0]["figures"] for k in ("stock", "patched"))
        return [name for name in stock if name in patched]

    def values(self, kernel, name):
        return sorted(run["figures"][name] for run in self.runs[kernel])

    def median(self, kernel, name):
        values = self.values(kernel, name)
        middle = len(values) // 2
        if len(values) % 2:
            return values[middle]
        return (values[middle - 1] + values[middle]) / 2

    def spread(self, name):
        """(largest - smallest) / median over the runs, of the worse kernel."""
        worst = 0.0
        for kernel in self.runs:
            values, median = self.values(kernel, name), self.median(kernel, name)
            if values[-1] != values[0]:
                worst = max(worst, (values[-1] - values[0]) / abs(median) if median else 1.0)
        return worst

    def unit(self, name):
        if name.endswith("_kb"):
            return "kB"
        return self.runs["stock"][0]["cost_unit"]

    def config(self, name, default=None):
        return self.runs["stock"][0].get("config", {}).get(name, default)


# syscall, calls, errors, total, min, avg, max in ms, of perf trace -s.
TRACED = re.compile(r"\s+([a-z_0-9]+)\s+(\d+)\s+\d+\s+[\d.]+\s+[\d.]+\s+([\d.]+)\s+([\d.]+)\s")


# contended, total wait, max wait and its unit, avg wait, type, caller, of perf lock.
WAITED = re.compile(r"\s+(\d+)\s+[\d.]+ \S+\s+([\d.]+) (ns|us|ms|s|m)\s+[\d.]+ \S+"
                    r"\s+(spinlock|rwlock|rwsem|mutex|semaphore|rt-mutex)\S*\s+(\S+)")
UNIT_US = {"ns": 0.001, "us": 1, "ms": 1000, "s": 1e6, "m": 6e7}


def add_wait(counters, waited):
    """Account a line of perf lock contention, by the type of lock."""
    count, longest = f"waits for a {waited[4]}", f"waits for a {waited[4]}: longest us"
    counters[count] = counters.get(count, 0) + int(waited[1])
    counters[longest] = max(counters.get(longest, 0), float(waited[2]) * UNIT_US[waited[3]])


def read_perf(lines):
    """{event: count or None} of the lines of perf stat -x ';', and what perf trace -s
    says of system calls and perf lock of waits, among others; of system calls that of
    the process that made most of each."""
    counters, calls = {}, {}
    for line in lines:
        fields = line.split(";")
        traced, waited = TRACED.match(line), WAITED.match(line)
        if waited:
            add_wait(counters, waited)
        elif traced and int(traced[2]) > calls.get(traced[1], 0):
            calls[traced[1]] = int(traced[2])
            counters[f"{traced[1]}: mean us"] = 1000 * float(traced[3])
            counters[f"{traced[1]}: longest us"] = 1000 * float(traced[4])
        elif len(fields) > 3 and not line.startswith("{"):
            value = fields[0].strip()
            counters[fields[2]] = float(value) if value[:1].isdigit() else None
    return counters


def read_list(path, build):
    """{label: Scenario} in the order of measure.sh's list."""
    scenarios = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        kernel, when, label, run, name = line.split("|")
        scenario = scenarios.setdefault(label, Scenario(label, when))
        lines = (Path(build) / name).read_text(encoding="utf-8").splitlines()
        if run == "perf":
            scenario.perf[kernel] = read_perf(lines)
        else:
            # The KVM selftest library has a word to say before.
            scenario.runs[kernel].append(json.loads(
                next(line for line in lines if line.startswith("{"))))
    return scenarios


def ratio(new, old):
    """For a table."""
    if old == new:
        return "1"
    return f"{new / old:.3g}" if old else "-"


def tables_left(scenario, kernel):
    """kB of page tables that all processes of a plug_unplug run have left."""
    return sum(scenario.median(kernel, name) for name in ("left_kb", "second_left_kb")
               if name in scenario.names())


def tables_needed(scenario):
    """kB that would do: of plugged blocks, at all levels."""
    processes = 2 if "second_left_kb" in scenario.names() else 1
    return processes * (scenario.median("stock", "ideal_left_kb") +
                        scenario.median("stock", "upper_kb"))
