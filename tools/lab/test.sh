#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# test.sh: run what tools/lab/tests lists.
#
# Our tests, and most of the stock ones, in the debug kernel, those of mm and those of
# KVM side by side; then all stock ones in the stock and in the patched release kernel,
# side by side as well, to compare.  With KERNEL=stock or another: only ours, in that
# kernel.
. "$(dirname "$0")/lib.sh"

kind=${KERNEL:-debug}
check_kind "$kind"
list=$lab/tests
out=$build/test
need python3=python3

comparing=0
[ "$kind" != debug ] || comparing=1
"$lab/build.sh" "$kind"
if [ "$comparing" = 1 ]; then
	"$lab/build.sh" stock
	"$lab/build.sh" patched
fi
"$lab/selftests.sh"
lock test

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

# kvm_tests: ours, with and without a TDP MMU; fails if the kernel complained in either.
kvm_tests() {
	local status=0

	in_kernel 2 "$kind" "$out/$kind" kvm || status=1
	APPEND=kvm.tdp_mmu=0 in_kernel 2 "$kind" "$out/$kind" shadow || status=1
	return $status
}

# our_tests WHICH...: in the kernel of $kind; fails if it complained in any boot.
our_tests() {
	local status=0 kvm

	kvm_tests >"$build/log/test-kvm.log" &
	kvm=$!
	in_kernel 2 "$kind" "$out/$kind" "$@" || status=1
	wait "$kvm" || status=1
	cat "$build/log/test-kvm.log"
	return $status
}

# compare KIND: what the stock tests give in a release kernel.
compare() {
	in_kernel 2 "$1" "$out/$1" stock both && in_kernel 3 "$1" "$out/$1" three
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
if [ "$comparing" = 1 ]; then
	step "our tests and stock ones in the debug kernel"
	our_tests ours both || splats=1
	step "stock tests in the stock and in the patched kernel"
	compare stock >"$build/log/test-stock.log" &
	stock=$!
	compare patched || splats=$((splats + 1))
	# A complaint of the stock kernel is not ours; what it gave is compared.
	wait "$stock" || step "note: the stock kernel complained"
	again
else
	step "our tests in $kind"
	our_tests ours || splats=1
	set_of_runs=()
fi
status=0
results --ours "$out/$kind" "${set_of_runs[@]}" >"$out/verdict" || status=1
[ "$splats" = 0 ] || status=1
# The count stays the last line; a complaint of a kernel counts as a failure.
awk -v splats="$splats" '
	/^[0-9]+ passed, / { $3 += splats }
	{ print }' "$out/verdict"
exit $status
