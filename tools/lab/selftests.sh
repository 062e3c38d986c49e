#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# selftests.sh: build the selftest programs, ours and the stock ones that
# tools/lab/tests and tools/lab/scenarios name, from the patched tree, into
# build/selftests/mm and build/selftests/kvm.  Every kernel runs the same programs.
. "$(dirname "$0")/lib.sh"

need gcc=gcc make=make rsync=rsync /usr/include/sys/capability.h=libcap-dev \
	/usr/include/numa.h=libnuma-dev /usr/include/uuid/uuid.h=uuid-dev
"$lab/tree.sh" patched
lock selftests
src=$build/src/patched
out=$build/selftests
log=$build/log/selftests.log
mkdir -p "$out"/{mm,kvm} "$build/log"

# programs DIRECTORY: what the lists name of one directory of selftests.
programs() {
	{
		awk '!/^#/ && NF { print $3 }' "$lab/tests"
		awk -F ' *[|] *' '!/^#/ && NF > 3 { split($4, word, " "); print word[1] }' "$lab/scenarios"
	} | sed -n "s,^$1/,$out/&,p" | sort -u
}

# compile DIRECTORY: its programs; scripts need no more than their place.
compile() {
	local script

	for script in $(programs "$1" | grep '\.py$' || true); do
		install -m 755 "$src/tools/testing/selftests/${script#"$out/"}" "$script"
	done
	programs "$1" | grep -v '\.py$' | xargs make -C "$src/tools/testing/selftests/$1" OUTPUT="$out/$1" \
		KHDR_INCLUDES="-isystem $build/headers/usr/include" -j"$(nproc)"
}

step "building $({ programs mm; programs kvm; } | wc -l) selftest programs"
{
	make -s -C "$src" O="$build/headers" ARCH=x86 headers && compile mm && compile kvm &&
		install "$src/tools/mm/ptmaps" "$out/mm"
} >"$log" 2>&1 || {
	grep -E -A 3 'error|\*\*\*' "$log" | head -n 20 >&2
	die "the selftests do not build: $log"
}
