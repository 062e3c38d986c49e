#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# eval.sh: what the series gives and what it costs, as a report.
#
# Measures every scenario of tools/lab/scenarios (QUICK=1: a part of them) in the
# stock and in the patched kernel: twice under QEMU's -icount, which shows how far
# the figures repeat, or, on a host with KVM, five times in ns.  One more run of
# each is counted by perf stat: software events, tracepoints and, where there is a
# PMU, cycles and misses.  Interrupted, it goes on with the scenario at hand.
#
# Results: build/report/index.html, report.md, results.json and *.svg.
. "$(dirname "$0")/lib.sh"

need /usr/bin/python3=python3 \
	/usr/lib/python3/dist-packages/matplotlib/__init__.py=python3-matplotlib
use_qemu
began=$SECONDS
when=full
[ "${QUICK:-0}" = 0 ] || when=quick
out=$build/report
mkdir -p "$out" 2>/dev/null || die "cannot create $out"

if can_use_kvm; then
	export ICOUNT=0
	PERF=1 "$lab/measure.sh" "$when" 5 "$out/list"
else
	# Counting slows what is counted, and needs no exact time: no -icount.
	ICOUNT=1 "$lab/measure.sh" "$when" 2 "$out/list"
	PERF=1 ICOUNT=0 "$lab/measure.sh" "$when" 0 "$out/list.perf"
	cat "$out/list.perf" >>"$out/list"
fi
/usr/bin/python3 "$lab/report.py" --list "$out/list" --build "$build" --out "$out" \
	--scenarios "$lab/scenarios" --describe "$(describe)"
step "took $((SECONDS - began)) s; build/report has index.html, report.md and results.json"
cat "$out/summary.txt"
