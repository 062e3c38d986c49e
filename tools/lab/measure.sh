#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# measure.sh WHEN RUNS LIST: measure the scenarios of tools/lab/scenarios in the
# stock and in the patched release kernel; write what came of it to LIST.
#
# WHEN is run, quick or full; each scenario is measured RUNS times.  On an emulated
# machine both kernels run side by side: under -icount what is counted are instructions,
# and without it (ICOUNT=0) time says nothing in any case.  On a host with KVM they run
# one after the other.  A result is kept in build/results under a name that is made of
# everything it depends on, so what was interrupted goes on where it stopped; FRESH=1
# measures again.  PERF=1 adds a run of each scenario under perf stat.
#
# LIST gets a line for each result: kernel|when|label|run|file, file below build/;
# run is 1 to RUNS, or "perf".
. "$(dirname "$0")/lib.sh"

when=$1 runs=$2 list=$3
icount=${ICOUNT:-1}
store=$build/results
programs=$build/selftests

use_qemu
[ "${PERF:-0}" = 0 ] || need perf=linux-perf
"$lab/build.sh" stock
"$lab/build.sh" patched
"$lab/selftests.sh"
lock measure
mkdir -p "$store"

# scenarios: "when|boot|label|command" of those that are wanted, blanks trimmed.
scenarios() {
	awk -F ' *[|] *' -v OFS='|' -v wanted="$when" '
	BEGIN { level["run"] = 1; level["quick"] = 2; level["full"] = 3 }
	/^#/ || NF < 4 { next }
	level[$1] <= level[wanted] { print $1, $2, $3, $4 }' "$lab/scenarios"
}

# What every result of one kernel depends on, but for the scenario.
machine_id() {
	{
		sha256sum <"$(image_of "$1")"
		qemu-system-x86_64 --version
		echo "icount $icount"
	} | sha256sum
}

# plan KIND: "boot|file|label|run|command" of every result that is wanted.
plan() {
	local kind=$1 machine boot label command key run again

	machine=$(machine_id "$kind")
	again=$(seq "$runs"; [ "${PERF:-0}" = 0 ] || echo perf)
	scenarios | while IFS='|' read -r _ boot label command; do
		key=$(echo "$machine $boot $label $command $(sha256sum <"$programs/${command%% *}")" |
			sha256sum | cut -c 1-16)
		for run in $again; do
			echo "$boot|$store/$kind-$key.$run|$label|$run|$command"
		done
	done
}

# The part of a plan that has no result yet.
missing() {
	while IFS='|' read -r boot file rest; do
		[ -s "$file" ] || echo "$boot|$file|$rest"
	done
}

# drive KIND: measure what is missing, a boot for each kernel parameter.
drive() {
	local kind=$1 todo=$build/results/$1.todo boot

	[ "${FRESH:-0}" = 0 ] || plan "$kind" | cut -d '|' -f 2 | xargs -r rm -f
	plan "$kind" | missing >"$todo.all"
	# shellcheck disable=SC2013  # a kernel parameter is a word
	for boot in $(cut -d '|' -f 1 "$todo.all" | sort -u); do
		awk -F '|' -v boot="$boot" '$1 == boot' "$todo.all" >"$todo"
		KERNEL=$kind NOBUILD=1 ICOUNT=$icount MEM=6G TIMEOUT=6000 APPEND=${boot#-} \
			CMD="$lab/guest/run-scenarios $todo $programs" \
			"$lab/vm.sh" 2>"$store/$kind.err" | sed -u "s/^/   $kind: /" >&2 || {
			cat "$store/$kind.err" >&2
			return 1
		}
	done
	rm -f "$todo" "$todo.all"
}

total=$(scenarios | wc -l)
kept=$(plan stock | while IFS='|' read -r _ file _; do [ ! -s "$file" ] || echo; done | wc -l)
[ "$kept" = 0 ] || [ "${FRESH:-0}" != 0 ] ||
	step "$kept results of an earlier run are kept (FRESH=1 measures again)"
step "measuring $total scenarios in stock and patched, $runs times"
if can_use_kvm; then
	drive stock || die "measuring the stock kernel failed"
	drive patched || die "measuring the patched kernel failed"
else
	drive stock &
	stock=$!
	drive patched || die "measuring the patched kernel failed"
	wait "$stock" || die "measuring the stock kernel failed"
fi
for kind in stock patched; do
	plan "$kind" | while IFS='|' read -r _ file label run _; do
		echo "$kind|$(scenarios | awk -F '|' -v l="$label" '$3 == l { print $1 }')|$label|$run|${file#"$build/"}"
	done
done >"$list.new"
mv "$list.new" "$list"
