#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# test.sh: run what tools/lab/tests lists.
#
# Our tests, and most of the stock ones, in the debug kernel; then all stock ones in the
# stock and in the patched release kernel, to compare.  Two machines run side by side all
# the time.  With KERNEL=stock or another: only ours, in that kernel.  FRESH=1 runs the
# stock kernel's part again, whose results are kept otherwise.
. "$(dirname "$0")/lib.sh"

kind=${KERNEL:-debug}
check_kind "$kind"
list=$lab/tests
out=$build/test
need python3=python3
use_qemu

comparing=0
[ "$kind" != debug ] || comparing=1
"$lab/build.sh" "$kind"
if [ "$comparing" = 1 ]; then
	"$lab/build.sh" stock
	"$lab/build.sh" patched
fi
"$lab/selftests.sh"
lock test
# Of each race of pt_reclaim_race, and of each variant of pt_reclaim_fuzz, unless the
# environment says otherwise.
export PT_RACE_SECONDS=${PT_RACE_SECONDS:-2} PT_FUZZ_CALLS=${PT_FUZZ_CALLS:-1000}

# in_kernel CPUS KIND DIR WHICH...: its part of the list (run-tests says how WHICH
# picks), results to DIR; fails if the kernel complained.
in_kernel() {
	local cpus=$1 kernel=$2 dir=$3 status=0 err

	shift 3
	err=$dir/vm.$1.err
	mkdir -p "$dir"
	KERNEL=$kernel NOBUILD=1 CPUS=$cpus MEM=4G TIMEOUT=2400 \
		CMD="$lab/guest/run-tests $list $dir $*" \
		"$lab/vm.sh" 2>"$err" || status=$?
	[ "$status" = 0 ] && return
	cat "$err" >&2
	echo "# FAILED: the $kernel kernel complained (see above)"
	return 1
}

# Everything that the stock kernel's results depend on.
stock_id() {
	{
		cat "$lab/guest/run-tests" "$lab/vm.sh" "$lab/guest/init"
		# Results have the number of their line: new ones of ours go to the end.
		awk '!/^#/ && NF && ++n && /^(stock|both|three) / { print n, $0 }' "$list"
		sha256sum <"$(image_of stock)"
		qemu-system-x86_64 --version
		awk '/^(stock|both|three) / { print $3 }' "$list" | sort -u |
			(cd "$build/selftests" && xargs sha256sum)
	} | sha256sum | cut -c 1-32
}

# run_part PART: what one machine does; fails if its kernel complained, but for the stock
# kernel, whose complaints are not ours.
run_part() {
	case $1 in
	ours | beside) in_kernel 2 "$kind" "$out/$kind" "$1" ;;
	ours_both) in_kernel 2 "$kind" "$out/$kind" ours both ;;
	shadow) APPEND=kvm.tdp_mmu=0 in_kernel 2 "$kind" "$out/$kind" shadow ;;
	nonpt) APPEND=kvm_amd.npt=0 in_kernel 2 "$kind" "$out/$kind" nonpt ;;
	patched) in_kernel 2 patched "$out/patched" stock both ;;
	patched_three) in_kernel 3 patched "$out/patched" three ;;
	stock) in_kernel 2 stock "$out/stock" stock both || : >"$out/stock.complained" ;;
	stock_three) in_kernel 3 stock "$out/stock" three || : >"$out/stock.complained" ;;
	esac
}

# kept_stock: use what the stock kernel gave in an earlier run, if there is that: it does
# not change, and it is kept under the name of all that it depends on.
kept_stock() {
	stock_kept=$cache/stock-results/$(stock_id)
	[ "${FRESH:-0}" = 0 ] && [ -d "$stock_kept" ] || return
	step "what the stock kernel gave in an earlier run is kept (FRESH=1 runs it again)"
	cp -r "$stock_kept" "$out/stock"
}

keep_stock() {
	if [ -e "$out/stock.complained" ]; then
		step "note: the stock kernel complained; what it gave is not kept"
		return
	fi
	mkdir -p "$cache/stock-results"
	rm -rf "$stock_kept" "$stock_kept.part"
	cp -r "$out/stock" "$stock_kept.part"
	mv "$stock_kept.part" "$stock_kept"
}

# machine: one part after the other, until none waits.
machine() {
	local part

	while part=$(next_part) && [ -n "$part" ]; do
		step "next: $part"
		run_part "$part" || : >"$out/splat.$part"
	done
}

# run_parts PART...: on two machines at a time.  Prints what the first gives at once, what
# the other gave at the end.  Counts in $splats the parts whose kernel complained.
run_parts() {
	printf '%s\n' "$@" >"$out/parts"
	machine &
	machine >"$build/log/test-beside.log" &
	wait
	cat "$build/log/test-beside.log"
	splats=$(find "$out" -maxdepth 1 -name 'splat.*' | wc -l)
}

# next_part: takes the first line of the list of parts that wait.
next_part() {
	flock "$out/parts.lock" sed -i -e '1{w /dev/stdout' -e 'd}' "$out/parts"
}

results() {
	/usr/bin/python3 "$lab/results.py" --tests "$list" "$@"
}

# again: where the kernels differ, run both programs twice more, one kernel after
# the other so that neither waits for the other's CPU.
again() {
	local numbers kernel n

	numbers=$(results --differing --stock "$out/stock" --patched "$out/patched")
	[ -n "$numbers" ] || return 0
	step "again, for they differed: $(echo "$numbers" | wc -l) programs"
	for n in 2 3; do
		for kernel in stock patched; do
			# shellcheck disable=SC2086  # numbers is a list of words
			in_kernel 3 "$kernel" "$out/$kernel.$n" $numbers ||
				[ "$kernel" = stock ] || splats=$((splats + 1))
		done
	done
	set_of_runs=(--stock "$out"/stock{,.2,.3} --patched "$out"/patched{,.2,.3})
}

set_of_runs=(--stock "$out/stock" --patched "$out/patched")
# The longest first.
parts=(ours beside shadow nonpt)
rm -rf "$out"
mkdir -p "$out"
echo "TAP version 13"
if [ "$comparing" = 1 ]; then
	parts=(ours_both beside patched shadow patched_three nonpt)
	kept_stock || parts=(ours_both beside patched stock shadow patched_three stock_three nonpt)
	step "our tests in the debug kernel, stock ones in debug, stock and patched"
else
	step "our tests in $kind"
	set_of_runs=()
fi
run_parts "${parts[@]}"
case " ${parts[*]} " in
*" stock_three "*) keep_stock ;;
esac
[ "$comparing" = 0 ] || again
status=0
results --ours "$out/$kind" "${set_of_runs[@]}" >"$out/verdict" || status=1
[ "$splats" = 0 ] || status=1
# The count stays the last line; a complaint of a kernel counts as a failure.
awk -v splats="$splats" '
	/^[0-9]+ passed, / { $3 += splats }
	{ print }' "$out/verdict"
exit $status
