#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""report.py: the evaluation as Markdown, HTML, plots and JSON.

  report.py --list FILE --build DIR --out DIR --scenarios FILE --describe TEXT

FILE is measure.sh's list of results below build/.  Writes to --out: results.json
(everything, for eval_compare.py), report.md, index.html (self-contained), *.svg,
and summary.txt, what a terminal is shown.  TEXT says what was measured on, a
"name: value" a line.

A figure is the median over the runs; "spread" is the distance between the largest
and the smallest run of the worse kernel, in percent of the median.  Units: kB are
1024 bytes; costs are guest instructions under QEMU's -icount, ns elsewhere.
"""
import argparse
import html
import json
from pathlib import Path

import matplotlib
matplotlib.use("svg")
# The same figures give the same bytes.
matplotlib.rcParams["svg.hashsalt"] = "linux-sparse-guest"
import matplotlib.pyplot as plt

from figures import NEUTRAL, ratio, read_list, tables_left, tables_needed

KERNELS = ("stock", "patched")
COLOUR = {"stock": "#b5442c", "patched": "#2c6fb5", "needed": "#555555"}
TIB_GIB = 1024

# The figures of the summary: of which scenario, and what a reader calls it.
SUMMARY = (
    ("anon 64G, calls of 1 MiB", "left_kb", "page tables left, 64 GiB unplugged by 1 MiB"),
    ("anon 64G, calls of 1 MiB", "discard_cost", "cost of that, a 2 MiB block"),
    ("anon 16G, a day", "mean_kb", "page tables over a day of plug and unplug, mean"),
    ("memfd 4G, punch hole", "left_kb", "page tables left, holes punched"),
    ("memfd 4G, the same, a second process", "second_left_kb", "the same, second process"),
    ("dense", "op_cost", "discard of a page, table stays in use"),
    ("hole", "op_cost", "the same, worst pattern"),
    ("fault-write", "op_cost", "page fault, write"),
    ("faults, 4 threads", "fault_cost", "page fault, 4 threads"),
    ("latency, 2 MiB", "median_cost", "discard of 2 MiB, full, median"),
    ("latency, 2 MiB", "p99_cost", "discard of 2 MiB, full, 99th percentile"),
    ("ops, all pages", "fork_exit_cost", "fork and exit, 64 MiB full"),
    ("ops, unplugged by 1 MiB", "fork_exit_cost", "fork and exit, 4 GiB unplugged"),
    ("ops, unplugged by 1 MiB", "munmap_cost", "munmap, 4 GiB unplugged"),
    ("memslot 64G, 1G populated", "tables_left_kb", "KVM page tables left, unplugged"),
    ("memslot 256G, 1G populated", "dirty_log_kb", "dirty log of a 256 GiB slot"),
    ("memslot 256G, 1G populated", "get_clean_log_cost", "getting it, nothing dirty"),
    ("memslot 64G, 1G populated", "delete_cost", "deleting a 64 GiB slot, unplugged"),
    ("memslot 64G, nested guest", "nested_entry_cost", "first entry of a nested guest"),
    ("memslot 64G, no TDP", "create_cost", "creating a 64 GiB slot, no TDP"),
    ("memslot 64G, no TDP", "create_kb", "metadata of that"),
    ("plug blocks, 64G", "plug_cost", "plugging a block (stock: a memslot)"),
    ("plug blocks, 64G", "unplug_cost", "unplugging it, a page touched"),
    ("plug blocks, 64G", "unplug_at_once_cost", "the same, in a call for 256"),
)


def number(value):
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def percent(value):
    return f"{100 * value:.2f} %"


class Table:
    """Rows for Markdown, HTML and a terminal."""

    def __init__(self, *head):
        self.head = head
        self.rows = []

    def add(self, *cells):
        self.rows.append([str(c) for c in cells])

    def markdown(self):
        lines = ["| " + " | ".join(self.head) + " |",
                 "|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.head))) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def html(self):
        def cells(tag, row):
            return "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row)
        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in self.rows)
        return f"<table><tr>{cells('th', self.head)}</tr>\n{body}</table>\n"

    def text(self):
        rows = [list(self.head)] + self.rows
        width = [max(len(row[i]) for row in rows) for i in range(len(self.head))]
        return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                                   for i, (c, w) in enumerate(zip(row, width))).rstrip()
                         for row in rows) + "\n"


def figure_row(scenario, name):
    old, new = (scenario.median(k, name) for k in KERNELS)
    return (number(old), number(new), scenario.unit(name), ratio(new, old),
            percent(scenario.spread(name)))


def summary_table(scenarios):
    table = Table("figure", "stock", "patched", "unit", "ratio", "spread")
    for label, name, text in SUMMARY:
        scenario = scenarios.get(label)
        if scenario and name in scenario.names():
            table.add(text, *figure_row(scenario, name))
    return table


def full_table(scenarios):
    table = Table("scenario: figure", "stock", "patched", "unit", "ratio", "spread")
    for scenario in scenarios.values():
        for name in scenario.names():
            table.add(f"{scenario.label}: {name}", *figure_row(scenario, name))
    return table


def counter_table(scenarios):
    """Counted by perf stat; and what could not be counted, by kernel."""
    table = Table("scenario: event", "stock", "patched")
    events = {k: set() for k in KERNELS}
    for scenario in scenarios.values():
        both = {}
        for kernel in KERNELS:
            for event, value in scenario.perf.get(kernel, {}).items():
                both.setdefault(event, {})[kernel] = value
                if value is not None and not event.endswith(" us"):
                    events[kernel].add(event)
        for event, values in both.items():
            if any(values.values()):
                table.add(f"{scenario.label}: {event}", *(
                    "-" if values.get(k) is None else number(values[k]) for k in KERNELS))
    return table, events


def commands(path):
    """label: (kernel parameter or "-", command) of the scenarios file."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        fields = [f.strip() for f in line.split("|")]
        if len(fields) == 4 and not line.startswith("#"):
            found[fields[2]] = (fields[1], fields[3])
    return found


def save(figure, out, name):
    path = out / f"{name}.svg"
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # Two of them are kept in Documentation/project, as they are.
    first, *lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [first, "<!-- SPDX-License-Identifier: GPL-2.0 -->", *lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def plot_tables_left(scenarios, out):
    chosen = [s for s in scenarios.values() if "left_kb" in s.names()]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(chosen) + 1.2))
    for i, s in enumerate(chosen):
        for k, shift in zip(KERNELS, (0.2, -0.2)):
            axes.barh(len(chosen) - i + shift, max(tables_left(s, k), 1), 0.38, color=COLOUR[k],
                      label=k if i == 0 else None)
        axes.plot([tables_needed(s)] * 2, [len(chosen) - i - 0.42, len(chosen) - i + 0.42],
                  color=COLOUR["needed"], linewidth=2, label="needed" if i == 0 else None)
    axes.set_yticks([len(chosen) - i for i in range(len(chosen))],
                    [s.label for s in chosen], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("page tables left after everything was unplugged, kB")
    axes.legend(loc="lower right", fontsize=8)
    return save(figure, out, "tables-left")


def series(scenario, kernel):
    return scenario.runs[kernel][0].get("series", {}).get("discard_cost")


def plot_latency(scenarios, out):
    chosen = [s for s in scenarios.values() if s.names() and series(s, "stock")]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(9, 5))
    for s in chosen:
        for k, style in zip(KERNELS, ("--", "-")):
            points = series(s, k)
            axes.plot([p[1] for p in points], [p[0] for p in points], style,
                      color=COLOUR[k], drawstyle="steps-post",
                      label=k if s is chosen[0] else None)
        axes.annotate(s.label.removeprefix("latency, "), (points[6][1], 50), fontsize=8,
                      rotation=90, ha="right", va="center")
    axes.set_xscale("log")
    axes.set_xlabel(f"cost of one discard, {chosen[0].unit('median_cost')}")
    axes.set_ylabel("percent of the discards that cost no more")
    axes.legend(loc="lower right", fontsize=8)
    return save(figure, out, "latency")


def memslots(scenarios, by, **wanted):
    """[(by in GiB, scenario)] of the memslot scenarios that match."""
    found = []
    for s in scenarios.values():
        if "create_cost" not in s.names() or ("no TDP" in s.label) != wanted.get("shadow", False):
            continue
        if s.config("nested") or any(s.config(k) != v for k, v in wanted.items() if k != "shadow"):
            continue
        found.append((s.config(by) / 2**30, s))
    return sorted(found, key=lambda pair: pair[0])


def plot_memslots(scenarios, out, name, by, groups, label):
    """groups: [(title, matching scenarios, figures)]."""
    groups = [g for g in groups if len(g[1]) > 1]
    if not groups:
        return None
    figure, all_axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4.5),
                                    squeeze=False)
    for axes, (title, chosen, names) in zip(all_axes[0], groups):
        for what, mark in zip(names, "os^Dv"):
            for k, style in zip(KERNELS, ("--", "-")):
                axes.plot([x for x, _ in chosen],
                          [max(s.median(k, what), 1) for _, s in chosen],
                          style + mark, color=COLOUR[k], markersize=4, label=f"{k}: {what}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"{by} GiB")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=7)
    return save(figure, out, name)


def plot_all(scenarios, out):
    mib64 = 64 * 2**30
    unit = next((s.unit("create_cost") for s in scenarios.values()
                 if "create_cost" in s.names()), "")
    costs = ("create_cost", "dirty_on_cost", "get_clean_log_cost", "delete_cost")
    plots = [
        ("Page tables left", plot_tables_left(scenarios, out)),
        ("Latency of a discard", plot_latency(scenarios, out)),
        ("Cost of a memslot by its size, 1 GiB populated", plot_memslots(
            scenarios, out, "memslot-size", "slot size,",
            [("TDP MMU", memslots(scenarios, "size", populated=2**30), costs),
             ("no TDP", memslots(scenarios, "size", populated=2**30, shadow=True), costs)],
            unit)),
        ("Cost of a 64 GiB memslot by what is populated", plot_memslots(
            scenarios, out, "memslot-populated", "populated,",
            [("TDP MMU", memslots(scenarios, "populated", size=mib64),
              ("dirty_on_cost", "get_dirty_log_cost", "dirty_on_unplugged_cost", "delete_cost"))],
            unit)),
    ]
    return [(title, name) for title, name in plots if name]


def per_tib(scenarios):
    """Inputs of Documentation/project/fleet.rst: measured figures, carried to 1 TiB."""
    table = Table("for each TiB of address space", "stock", "patched", "unit", "measured on")
    wanted = (
        ("anon 64G, calls of 1 MiB", "left_kb", 64, "VMM page tables left by unplug, 1 MiB calls"),
        ("memfd 4G, punch hole", "left_kb", 4, "VMM page tables left by hole punch"),
        ("memfd 4G, the same, a second process", "second_left_kb", 4,
         "page tables left in a vhost-user process"),
        ("memslot 64G, 64G populated", "tables_left_kb", 64, "KVM page tables left by unplug"),
        ("memslot 64G, 1G populated", "tables_left_kb", 1, "KVM page tables left by unplug"),
        ("memslot 256G, 1G populated", "dirty_log_kb", 256, "dirty log"),
        ("memslot 256G, 1G populated", "get_clean_log_cost", 256, "getting a clean dirty log"),
        ("memslot 64G, nested guest", "nested_entry_kb", 64, "metadata, nested guest"),
        ("memslot 64G, nested guest", "nested_entry_cost", 64, "first entry of a nested guest"),
        ("memslot 64G, no TDP", "create_kb", 64, "metadata, no TDP"),
    )
    seen = set()
    for label, name, gib, text in wanted:
        scenario = scenarios.get(label)
        if text in seen or not scenario or name not in scenario.names():
            continue
        seen.add(text)
        table.add(text, *(number(scenario.median(k, name) * TIB_GIB / gib) for k in KERNELS),
                  scenario.unit(name), f"{gib} GiB")
    return table


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto;
  padding: 0 1em; color: #222 } table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } svg { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .7em; overflow: auto }"""


class Report:
    """The same sections as Markdown and as HTML."""

    def __init__(self, title, out):
        self.out = out
        self.md = [f"# {title}\n"]
        self.page = [f"<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}"
                     f"</title><style>{STYLE}</style><h1>{title}</h1>\n"]

    def head(self, text):
        self.md.append(f"## {text}\n")
        self.page.append(f"<h2>{html.escape(text)}</h2>\n")

    def text(self, text):
        self.md.append(text + "\n")
        self.page.append(f"<p>{html.escape(text)}</p>\n")

    def pre(self, text):
        self.md.append("```\n" + text.rstrip() + "\n```\n")
        self.page.append(f"<pre>{html.escape(text)}</pre>\n")

    def table(self, table):
        self.md.append(table.markdown())
        self.page.append(table.html())

    def plot(self, title, name):
        self.md.append(f"![{title}]({name})\n")
        svg = (self.out / name).read_text(encoding="utf-8")
        self.page.append(f"<h3>{html.escape(title)}</h3>\n{svg[svg.index('<svg'):]}\n")

    def write(self):
        (self.out / "report.md").write_text("\n".join(self.md), encoding="utf-8")
        (self.out / "index.html").write_text("".join(self.page) + "</html>\n", encoding="utf-8")


HOW = """Every figure is printed by the command below its scenario's name, run in both
kernels, which are built from one configuration. *_kb is memory, by the kernel's own
account (VmPTE of /proc/PID/status, SecPageTables, VmallocUsed and Slab of /proc/meminfo);
*_cost is the cost of the operation that the command's --help names. Where the unit is insn,
time was counted in guest instructions by QEMU's -icount: exact, the same on every machine,
and blind to caches, TLBs and waiting. Ratio is patched to stock; spread is largest less
smallest run, of the worse kernel, in percent of the median."""


def write_report(scenarios, args, out):
    report = Report("linux-sparse-guest: stock against patched", out)
    report.head("Summary")
    report.table(summary_table(scenarios))
    skipped = [s.label for s in scenarios.values() if s.skipped()]
    if skipped:
        report.text("Skipped, for the machine or a kernel lacks what they need: "
                    + "; ".join(skipped) + ".")
    report.head("Plots")
    for title, name in plot_all(scenarios, out):
        report.plot(title, name)
    report.head("For each TiB")
    report.table(per_tib(scenarios))
    report.head("How each figure was obtained")
    report.text(" ".join(HOW.split()))
    report.head("Measured on")
    report.pre(args.describe)
    report.head("All figures")
    report.table(full_table(scenarios))
    report.head("Counted by perf")
    table, events = counter_table(scenarios)
    for kernel in KERNELS:
        report.text(f"Events that could be counted in the {kernel} kernel: "
                    + (", ".join(sorted(events[kernel])) or "none")
                    + ". Cycles, instructions and TLB misses need a PMU"
                    + (": there is none here, so these figures are missing."
                       if "cycles" not in events[kernel] else "."))
    report.text("System calls were timed by perf trace in the same run, and waits for locks by perf "
                "lock contention (for how long somebody held what somebody wanted): of the real "
                "machine where it has KVM, else of the emulated one, whose time is no measure of "
                "any host's.")
    report.table(table)
    report.head("Commands")
    boots = commands(args.scenarios)
    report.pre("\n".join(f"{s.label}\n    {boots[s.label][1]}"
                         + (f"    [{boots[s.label][0]}]" if boots[s.label][0] != "-" else "")
                         for s in scenarios.values() if s.label in boots))
    report.write()


def as_json(scenarios, args):
    return {"describe": args.describe, "neutral": NEUTRAL, "scenarios": {
        s.label: {"when": s.when, "runs": s.runs, "perf": s.perf} for s in scenarios.values()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--list", "--build", "--out", "--scenarios", "--describe"):
        parser.add_argument(option, required=True)
    args = parser.parse_args()
    out = Path(args.out)
    scenarios = read_list(args.list, args.build)
    (out / "results.json").write_text(json.dumps(as_json(scenarios, args), indent=1) + "\n",
                                      encoding="utf-8")
    write_report(scenarios, args, out)
    (out / "summary.txt").write_text(summary_table(scenarios).text() + "\n"
                                     + per_tib(scenarios).text(), encoding="utf-8")


if __name__ == "__main__":
    main()
