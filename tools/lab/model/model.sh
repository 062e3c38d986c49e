#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# model.sh: check tdp_free.pml, how shadow pages are freed, and unplug.pml, how blocks
# of sparse memslots are unplugged, with spin.
#
# One line for each search: the model as it is must have no error, get to all that it
# is to get to, and be searched as a whole; each broken variant must have the error
# that it is there for.  Exit status 1 otherwise.  Each search has a directory in
# build/model, with spin's output and, after an error, the trail.
# shellcheck source=lib.sh
. "$(dirname "$0")/../lib.sh"

work=$build/model
failed=0

need spin=spin gcc=gcc /usr/include/stdio.h=libc6-dev
lock model
rm -rf "$work"
mkdir -p "$work" 2>/dev/null || die "cannot create $work"

# search NAME CFLAGS OPTION...: output to the log in its directory.  The options are
# those of the model.
search() {
	local dir=$work/$1 cflags=$2

	shift 2
	mkdir "$dir"
	cp "$model" "$dir"
	echo "$*" >"$dir/options"
	(
		cd "$dir"
		ulimit -t 300
		# shellcheck disable=SC2086  # a word for each flag
		spin -a "$@" "${model##*/}" && gcc $cflags -w -DSAFETY -DMEMLIM=1500 -o pan pan.c &&
			./pan -n -m200000 -w22
	) 2>&1 | awk '!/^ *reached / || !seen[$0]++' >"$dir/log" || true
}

# verdict NAME FINDING: a search is ok if there is none.
verdict() {
	local dir=build/model/$1 replay=

	[ -n "$2" ] || return 0
	failed=1
	[ ! -e "$top/$dir/${model##*/}.trail" ] ||
		replay="; to replay: cd $dir && spin -t -p -g -l $(cat "$top/$dir/options") ${model##*/}"
	echo "FAIL - $1: $2; see $dir/log$replay"
	return 1
}

error_of() {
	sed -nE 's/^pan:[0-9]+: (.*) \(at depth.*/\1/p' "$work/$1/log" | head -n 1
}

# free NAME PROBE...: no error, and what the model says to be reached is.
free() {
	local name=$1 log=$work/$1/log finding probe

	shift
	finding=$(error_of "$name")
	if [ -n "$finding" ]; then
		finding="$finding in the model as it is"
	elif ! grep -q 'errors: 0$' "$log" ||
		grep -qiE 'not completed|too small|out of memory|MEMLIM bound|interrupted|error:' "$log"; then
		finding="the search was not completed"
	fi
	for probe; do
		grep -q "^ *reached $(sed -nE "s/^#define $probe\t+([0-9]+)\t.*/\1/p" "$model")\$" "$log" ||
			finding=${finding:-$probe is never reached}
	done
	verdict "$name" "$finding" || return 0
	echo "ok - $name: $(awk '/states, stored/ { print $1 }' "$log") states, no error${*:+, reached: $*}"
}

# broken NAME ASSERTION OPTION...: this one fails.
broken() {
	local name=$1 assertion=$2 finding=

	shift 2
	search "$name" '-O0 -DCOLLAPSE' "-D$name" "$@"
	case $(error_of "$name") in
	"assertion violated  !($assertion)") ;;
	'') finding="no error found" ;;
	*) finding="$(error_of "$name"), where !($assertion) must be" ;;
	esac
	verdict "$name" "$finding" || return 0
	echo "ok - $name: error found, as it must be: !($assertion)"
}

model=$lab/model/unplug.pml
search unplug '-O0 -DPRINTF' -DPROBE
free unplug FAULT_EXITS MAPS_BOTH ZAPS_BOTH WAITS IS_CACHED CACHE_GOES ACCESS_FAILS
broken NO_GRACE_PERIOD kvm_reached
broken ZAP_FIRST hw_reached
broken CACHE_FIRST kvm_reached
broken NO_ZAP_FLUSH hw_reached
broken LOOK_OUTSIDE hw_reached
broken LOOK_TWICE is_mmio
broken NO_LEVEL_CLAMP hw_reached
broken NO_CACHE_LOOK kvm_reached

model=$lab/model/tdp_free.pml
# The hardware and lockless walks have no effect on each other, hence are searched
# one without the other.  The long search goes on beside the others.
hardware=(-DNO_LOCKLESS)
lockless=(-DNO_VCPU)
search free -O2 "${hardware[@]}" &
search free-lockless '-O0 -DPRINTF' "${lockless[@]}" -DPROBE
search free-faults '-O0 -DPRINTF' "${hardware[@]}" -DUNMAPS=1 -DLATE_FAULT=1 -DPROVE_MMU -DPROBE
search free-two-at-once -O0 "${hardware[@]}" "${lockless[@]}" -DUNMAPS=1 -DDISCARDS=2
wait
free free
free free-lockless WALK_UNLINKED WALK_LOSES FREED_IN_YIELD REUSED_AS_SP HEAD_GOES EMPTY_GOES
free free-faults READ_UNLINKED READ_FROZEN STALE_CACHE FREED_IN_YIELD REUSED_AS_SP \
	FAULT_IN_YIELD STALE_FAULT HEAD_GOES PARENT_GOES EMPTY_GOES ALL_GONE
free free-two-at-once

broken NO_FLUSH hw_reused "${hardware[@]}"
broken PARENT_NO_FLUSH hw_reused "${hardware[@]}" -DUNMAPS=1
broken FLUSH_AFTER_UNLOCK hw_reused "${hardware[@]}" -DUNMAPS=1
broken FLUSH_FIRST hw_freed "${hardware[@]}" -DUNMAPS=1
broken FLUSH_BEFORE_PATH hw_reused "${hardware[@]}" -DUNMAPS=1
broken YIELD_WITHOUT_FLUSH hw_reused "${hardware[@]}" -DUNMAPS=1
broken YIELD_FLUSH_LATE hw_reused "${hardware[@]}" -DUNMAPS=1
broken YIELD_KEEPS_TABLE dangling "${hardware[@]}" "${lockless[@]}" -DUNMAPS=1 -DDISCARDS=2
broken NO_RCU sw_reused "${lockless[@]}" -DUNMAPS=1
broken CALL_RCU_FIRST sw_reused "${lockless[@]}" -DUNMAPS=1
broken LOST_CALLBACK leaked "${lockless[@]}" -DUNMAPS=1
broken NO_EMPTY_CHECK has_child "${lockless[@]}" -DUNMAPS=1
broken NO_RETURN_FLUSH hw_freed "${hardware[@]}" -DUNMAPS=1
broken NO_STALE_CHECK hw_freed "${hardware[@]}" -DUNMAPS=1 -DLATE_FAULT=1
broken PLAIN_STORE bug_pfn "${lockless[@]}" -DUNMAPS=1
broken LATE_MODE hw_freed "${hardware[@]}" -DUNMAPS=1
broken NO_FLUSH_PROVED unflushed "${hardware[@]}" "${lockless[@]}"
[ "$failed" -eq 0 ]
