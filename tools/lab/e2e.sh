#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# e2e.sh: real guests with virtio-mem and virtio-balloon on the stock and on the
# patched kernel; what is left of page tables when their memory is gone.
#
# Boots both release kernels side by side; in each a QEMU of 10 or newer runs, with
# KVM, a guest (our stock kernel and guest/agent.c), whose memory is resized by QMP,
# filled and checked: guest/e2e.py has the scenarios.  Two of them want the QEMU that
# qemu_build.sh makes with patches/qemu, and one of these guest/hostile.c.
#
#   SCENARIO=…   only these of `guest/e2e.py --list`
#
# A scenario that went well is not run again while kernels and scripts are the
# same: build/e2e/KIND-ID keeps it.  Prints the table and one line for each check,
# kept in build/e2e/results.txt and results.json.  Exit status 1 when a guest died,
# data was lost, a scenario did not finish or a kernel complained; no figure fails
# a run.
. "$(dirname "$0")/lib.sh"

out=$build/e2e
driver=$lab/guest/e2e.py
# Both kernels together have to be done within half an hour.
limit=1700
declare -A machine

# What a result depends on.
identity() {
	{
		"$qemu/qemu-system-x86_64" --version
		cat "$(image_of "$1")" "$(image_of stock)" "$driver" "$lab/guest/agent.c" \
			"$lab/guest/hostile.c" "$lab/guest/init" "$lab/vm.sh" \
			"$lab/qemu_build.sh" "$lab/qemu_base" "$top"/patches/qemu/*/*.patch
	} | sha256sum | cut -c 1-12
}

make_initramfs() {
	local root

	root=$(mktemp -d "$out/.initrd.XXXXXX")
	scratch+=("$root")
	gcc -static -O2 -Wall -Wextra -o "$root/init" "$lab/guest/agent.c" 2>"$root.err" || {
		cat "$root.err" >&2
		die "tools/lab/guest/agent.c does not compile"
	}
	rm -f "$root.err"
	(cd "$root" && echo init | cpio -o -H newc --quiet) | gzip >"$out/initrd.new"
	mv "$out/initrd.new" "$out/initrd"
}

# A guest that needs no kernel, nor anything below it but what its source says.
make_hostile() {
	gcc -static -nostdlib -ffreestanding -mgeneral-regs-only -mno-red-zone -no-pie -fno-pic \
		-fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables -O2 \
		-Wall -Wextra -Wl,-e,start -Wl,--build-id=none -o "$out/hostile.new" \
		"$lab/guest/hostile.c" >&2 || die "tools/lab/guest/hostile.c does not compile"
	mv "$out/hostile.new" "$out/hostile"
}

# wants SCENARIO
wants() {
	[[ " $scenarios " = *" $1 "* ]]
}

# The scenarios whose results are not there yet.
pending() {
	local name

	for name in $scenarios; do
		[ -e "$1/$name.json" ] || echo "$name"
	done
}

# start KIND: boot the kernel in a process group of its own, for it has to go as a
# whole when we are interrupted.
start() {
	local kind=$1 dir=$out/$1-${id[$1]} todo name

	mkdir -p "$dir"
	mapfile -t todo < <(pending "$dir")
	if [ ${#todo[@]} -eq 0 ]; then
		step "$kind: all results are there"
		return
	fi
	printf '%s\n' "${todo[@]}" >"$dir/running"
	for name in "${todo[@]}"; do
		rm -f "$dir/$name.failed.json"
	done
	export KERNEL=$kind NOBUILD=1 MEM=6G CPUS=2 TIMEOUT=$limit
	CMD="/usr/bin/python3 $(printf '%q ' "$driver" --qemu "$qemu" --kernel "$(image_of stock)" \
		--initrd "$out/initrd" --sparse-qemu "$sparse_qemu" --hostile "$out/hostile" \
		--out "$dir" "${todo[@]}")" \
		setsid "$lab/vm.sh" > >(sed -u "s/^/   $kind: /" >&2) 2>"$dir/vm.err" </dev/null &
	machine[$kind]=$!
}

# finish KIND: wait for it; when its kernel complained, no result of it counts.
finish() {
	local dir=$out/$1-${id[$1]} status=0 name

	[ -n "${machine[$1]:-}" ] || return 0
	wait "${machine[$1]}" || status=$?
	unset "machine[$1]"
	[ "$status" = 0 ] || cat "$dir/vm.err" >&2
	if [ "$status" = 99 ]; then
		while IFS= read -r name; do
			rm -f "$dir/$name.json"
		done <"$dir/running"
	fi
	return "$status"
}

# shellcheck disable=SC2317,SC2329  # called by the trap below
stop() {
	local kind

	for kind in "${!machine[@]}"; do
		kill -TERM -- "-${machine[$kind]}" 2>/dev/null || true
	done
	interrupted
}

need python3=python3 gcc=gcc cpio=cpio gzip=gzip /usr/include/stdio.h=libc6-dev
began=$SECONDS
mapfile -t known < <(/usr/bin/python3 "$driver" --list)
scenarios=${SCENARIO:-${known[*]}}
for name in $scenarios; do
	[[ " ${known[*]} " = *" $name "* ]] ||
		die "SCENARIO=$name: there is no such scenario; choose from: ${known[*]}"
done
"$lab/build.sh" stock
"$lab/build.sh" patched
lock e2e
qemu=$("$lab/qemu.sh")
use_qemu
sparse_qemu=""
if wants sparse || wants hostile; then
	sparse_qemu=$("$lab/qemu_build.sh")
fi
mkdir -p "$out"
make_initramfs
make_hostile
declare -A id=([stock]=$(identity stock) [patched]=$(identity patched))

trap stop INT TERM
step "booting stock and patched, running in each: $scenarios"
start stock
start patched
stock=0 patched=0
finish stock || stock=$?
finish patched || patched=$?
status=0
# shellcheck disable=SC2086  # a list of words
/usr/bin/python3 "$lab/e2e_table.py" --stock "$out/stock-${id[stock]}" --stock-status "$stock" \
	--patched "$out/patched-${id[patched]}" --patched-status "$patched" \
	--qemu "$("$qemu/qemu-system-x86_64" --version | head -n 1)" \
	--json "$out/results.json" $scenarios >"$out/results.txt.new" || status=$?
mv "$out/results.txt.new" "$out/results.txt"
step "took $((SECONDS - began)) s; kept in build/e2e/results.txt and results.json"
cat "$out/results.txt"
exit "$status"
