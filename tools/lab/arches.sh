#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# arches.sh: that the patched tree builds for other architectures.
#
# Makes what the series touches (objects.sh has what that is) with Debian's cross
# compilers and W=1, from the architecture's defconfig and config/arches.config, with
# PT_RECLAIM on, where the architecture has it, and off; for 32-bit x86, which needs no
# cross compiler, with page tables of three and of two levels.  A warning in a file that
# the series touches is a failure unless the stock tree gives it, too.  A line for each
# failure, a table at the end; exit status 1 if anything failed.  The products are in
# build/arches; ccache makes the second run faster.
#
# ARCHES='arm64 s390x': these alone.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/objects.sh
. "$lab/objects.sh"

arches=${ARCHES:-arm64 riscv64 s390x powerpc64le i386}
work=$build/arches
table=$work/table
failed=0

# Sets for one architecture: ARCH=, the directory of arch/, the compilers' prefix.
architecture() {
	case $1 in
	arm64) arch=arm64 dir=arm64 prefix=aarch64-linux-gnu- ;;
	riscv64) arch=riscv dir=riscv prefix=riscv64-linux-gnu- ;;
	s390x) arch=s390 dir=s390 prefix=s390x-linux-gnu- ;;
	powerpc64le) arch=powerpc dir=powerpc prefix=powerpc64le-linux-gnu- ;;
	i386) arch=i386 dir=x86 prefix= ;;
	*) die "ARCHES=$1: there is no such architecture; choose from: arm64 riscv64 s390x powerpc64le i386" ;;
	esac
}

# The compilers that are asked for, and no other.
compilers() {
	local name

	for name in $arches; do
		architecture "$name"
		[ -z "$prefix" ] || echo "${prefix}gcc=gcc-${prefix%-}"
	done
}

# kmake TREE OUT…
kmake() {
	local tree=$1 out=$2 kconfig=()

	shift 2
	[ ! -e "$work/$out/Kconfig" ] || kconfig=(KBUILD_KCONFIG="$work/$out/Kconfig")
	make -C "$build/src/$tree" O="$work/$out" ARCH="$arch" CROSS_COMPILE="$prefix" \
		CC="ccache ${prefix}gcc" "${kconfig[@]}" -j"$(nproc)" "$@" </dev/null
}

# configure TREE OUT VARIANT
configure() {
	local config=$work/$2/.config

	mkdir -p "$work/$2"
	rm -f "$work/$2/Kconfig"
	[ "$3" != off ] || without_reclaim "$build/src/$1" >"$work/$2/Kconfig"
	kmake "$1" "$2" -s defconfig || return
	cat "$lab/config/arches.config" >>"$config"
	[ "$3" != two-level ] || echo CONFIG_X86_PAE=n >>"$config"
	kmake "$1" "$2" -s olddefconfig || return
	configured "$config" KVM || echo "error: CONFIG_KVM=y did not take effect"
	[ "$3" != off ] || ! configured "$config" PT_RECLAIM ||
		echo "error: CONFIG_PT_RECLAIM=n did not take effect"
}

# compile TREE OUT: objects that are there would warn of nothing.
compile() {
	local list

	mapfile -t list < <(targets "$dir" "$work/$2/.config" <"$build/src/patched.files")
	(cd "$work/$2" && find . -name '*.o' | { grep -F -e ./virt/ "${list[@]/#/-e./}" || true; } |
		xargs -r rm -f)
	kmake "$1" "$2" W=1 "${list[@]}"
}

# warnings LOG: those in files of the series, less line numbers.
warnings() {
	grep 'warning: ' "$1" | plain_paths | sed -E 's/:[0-9]+(:[0-9]+)?:/:/' |
		grep -F -f <(sed 's/$/:/' "$build/src/patched.files") | sort -u || true
}

# make_one TREE OUT VARIANT LOG: 1 if it does not build.
make_one() {
	{
		configure "$1" "$2" "$3" && compile "$1" "$2" || echo "error: make failed"
	} >"$4" 2>&1
	! grep -q '^error: ' "$4"
}

# new_warnings OUT VARIANT LOG: what stock gives as well is not ours.
new_warnings() {
	local log=$build/log/arches-stock.log

	warnings "$3" >"$work/warnings"
	[ -s "$work/warnings" ] || return 0
	make_one stock "$1.stock" "$2" "$log" || echo "the stock tree does not build: $(complaint "$log")"
	comm -23 "$work/warnings" <(warnings "$log")
}

# without OUT: the series' files that this kernel has no use for.
without() {
	local file

	sources "$dir" <"$build/src/patched.files" | while read -r file; do
		[ -e "$work/$1/${file%.c}.o" ] || echo "$file"
	done | sort | tr '\n' ' '
}

# row NAME VARIANT OUT OBJECTS WARNINGS: a line of the table, as it was configured.
row() {
	local config=$work/$3/.config reclaim=off

	! configured "$config" PT_RECLAIM || reclaim=on
	printf '%-12s %-10s %6s %8s %9s\n' "$1" "$reclaim" \
		"$(sed -n 's/^CONFIG_PGTABLE_LEVELS=//p' "$config")" "$4" "$5" >>"$table"
}

fail() {
	failed=$((failed + 1))
	echo "FAIL $*"
}

# run NAME VARIANT
run() {
	local out=$1-$2 log=$build/log/arches-$1-$2.log found=$work/found count

	step "$1, $2 (log: build/log/arches-$1-$2.log)"
	if ! make_one patched "$out" "$2" "$log"; then
		fail "$1, $2: $(complaint "$log")"
		row "$1" "$2" "$out" failed -
		return
	fi
	new_warnings "$out" "$2" "$log" >"$found"
	count=$(wc -l <"$found")
	[ "$count" -eq 0 ] || {
		fail "$1, $2: $count new warnings"
		sed 's/^/     /' "$found"
	}
	row "$1" "$2" "$out" "$(compiled "$log")" "$count"
	[ "$2" = off ] || step "$1, $2: has no use for $(without "$out")"
}

# An architecture that has no PT_RECLAIM is done after its first kernel.
run_all() {
	architecture "$1"
	run "$1" on
	if configured "$work/$1-on/.config" PT_RECLAIM; then
		run "$1" off
	fi
	[ "$1" != i386 ] || run "$1" two-level
}

for name in $arches; do
	architecture "$name"
done
mapfile -t compilers < <(compilers)
need gcc=gcc make=make flex=flex bison=bison bc=bc ccache=ccache perl=perl \
	/usr/bin/python3=python3 /usr/include/libelf.h=libelf-dev \
	/usr/include/openssl/ssl.h=libssl-dev /usr/include/stdio.h=libc6-dev "${compilers[@]}"
"$lab/tree.sh" patched
lock arches
need_disk "$work" 2
mkdir -p "$build/log"
export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR=$top CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=10G
printf '%-12s %-10s %6s %8s %9s\n' architecture PT_RECLAIM levels objects warnings >"$table"
for name in $arches; do
	run_all "$name"
done
cat "$table"
[ "$failed" -eq 0 ]
