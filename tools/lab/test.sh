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
# Of each race of pt_reclaim_race, unless the environment says otherwise.
export PT_RACE_SECONDS=${PT_RACE_SECONDS:-2}

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

# tests_beside: ours of the second machine, with and without a TDP MMU; fails if the
# kernel complained in either.
tests_beside() {
	local status=0

	in_kernel 2 "$kind" "$out/$kind" beside || status=1
	APPEND=kvm.tdp_mmu=0 in_kernel 2 "$kind" "$out/$kind" shadow || status=1
	return $status
}

# compare KIND: what the stock tests give in a release kernel.
compare() {
	in_kernel 2 "$1" "$out/$1" stock both && in_kernel 3 "$1" "$out/$1" three
}

# Everything that the stock kernel's results depend on.
stock_id() {
	{
		cat "$list" "$lab/guest/run-tests" "$lab/vm.sh" "$lab/guest/init"
		sha256sum <"$(image_of stock)"
		qemu-system-x86_64 --version
		awk '/^(stock|both|three) / { print $3 }' "$list" | sort -u |
			(cd "$build/selftests" && xargs sha256sum)
	} | sha256sum | cut -c 1-32
}

# compare_stock: the same for the stock kernel, which does not change: what it gave is
# kept under the name of all that it depends on.
compare_stock() {
	local kept

	kept=$cache/stock-results/$(stock_id)
	if [ "${FRESH:-0}" = 0 ] && [ -d "$kept" ]; then
		step "what the stock kernel gave in an earlier run is kept (FRESH=1 runs it again)"
		cp -r "$kept" "$out/stock"
		return
	fi
	compare stock || return
	mkdir -p "$cache/stock-results"
	rm -rf "$kept" "$kept.part"
	cp -r "$out/stock" "$kept.part"
	mv "$kept.part" "$kept"
}

# second_machine: what runs beside our tests of mm and what the patched kernel gives:
# those of KVM, and the stock kernel, to compare with.
second_machine() {
	local status=0

	tests_beside || status=1
	# A complaint of the stock kernel is not ours; what it gave is compared.
	[ "$comparing" = 0 ] || compare_stock || step "note: the stock kernel complained"
	return $status
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

splats=0
set_of_runs=(--stock "$out/stock" --patched "$out/patched")
rm -rf "$out"
mkdir -p "$out"
echo "TAP version 13"
second_machine >"$build/log/test-beside.log" &
other=$!
if [ "$comparing" = 1 ]; then
	step "our tests in the debug kernel, stock ones in debug, stock and patched"
	in_kernel 2 "$kind" "$out/$kind" ours both || splats=1
	compare patched || splats=$((splats + 1))
else
	step "our tests in $kind"
	in_kernel 2 "$kind" "$out/$kind" ours || splats=1
	set_of_runs=()
fi
wait "$other" || splats=$((splats + 1))
cat "$build/log/test-beside.log"
[ "$comparing" = 0 ] || again
status=0
results --ours "$out/$kind" "${set_of_runs[@]}" >"$out/verdict" || status=1
[ "$splats" = 0 ] || status=1
# The count stays the last line; a complaint of a kernel counts as a failure.
awk -v splats="$splats" '
	/^[0-9]+ passed, / { $3 += splats }
	{ print }' "$out/verdict"
exit $status
