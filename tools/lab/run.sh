#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# run.sh: what stock leaves behind and what the series frees, in one table.
#
# Builds the stock and the patched release kernel from one configuration, boots
# both side by side under QEMU's -icount, where time counts guest instructions,
# and drives the "run" scenarios of tools/lab/scenarios in each.
# Results: build/run/results.txt and results.json.
. "$(dirname "$0")/lib.sh"

need python3=python3
began=$SECONDS
out=$build/run
mkdir -p "$out" 2>/dev/null || die "cannot create $out"
"$lab/measure.sh" run 1 "$out/list"
/usr/bin/python3 "$lab/table.py" --list "$out/list" --build "$build" \
	--json "$out/results.json" >"$out/results.txt.new"
mv "$out/results.txt.new" "$out/results.txt"
step "took $((SECONDS - began)) s; kept in build/run/results.txt and results.json"
cat "$out/results.txt"
