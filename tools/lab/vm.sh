#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# vm.sh: run a command in one of our kernels.
#
#   KERNEL=KIND     stock, patched, debug or stock-debug (default patched)
#   CMD=…           what to run, by bash, as root; without it: a shell
#   MEM=4G CPUS=2   size; two CPUs or more make two NUMA nodes
#   ICOUNT=1        one CPU and virtual time: 2 ns for each guest instruction;
#                   programs see PT_ICOUNT_SHIFT=1
#   TIMEOUT=1800    seconds that a command may take, boot included
#   APPEND=…        added to the kernel command line
#   QEMU_OPTS=…     added to QEMU's
#   BZIMAGE=FILE    this kernel instead of one of ours
#
# The machine's files are visible at the same paths; what is written goes to
# memory and is gone afterwards, except below the checkout's build directory.
# /tmp is a fresh ext4 of 6 GiB, /dev/vdb an empty 1 GiB disk (for swap).
#
# Exit status: the command's; 99 when the kernel complained on its console
# though the command succeeded, or died; 124 when the time was up.
. "$(dirname "$0")/lib.sh"

kind=${KERNEL:-patched}
mem=${MEM:-4G}
cpus=${CPUS:-2}
icount=${ICOUNT:-0}
timeout=${TIMEOUT:-1800}
cmd=${CMD:-}

check_kind "$kind"
[[ $mem =~ ^[0-9]+[MG]$ ]] || die "MEM=$mem: want a number with M or G"
[[ $cpus =~ ^[1-9][0-9]?$ ]] || die "CPUS=$cpus: want a number from 1 to 99"
[[ $timeout =~ ^[1-9][0-9]*$ ]] || die "TIMEOUT=$timeout: want seconds"
use_qemu
need cpio=cpio mkfs.ext4=e2fsprogs \
	/bin/busybox=busybox-static gzip=gzip
if [ -n "${BZIMAGE:-}" ]; then
	[ -f "$BZIMAGE" ] || die "BZIMAGE=$BZIMAGE: no such file"
elif [ "${NOBUILD:-0}" = 0 ]; then
	"$lab/build.sh" "$kind"
fi
image=${BZIMAGE:-$(image_of "$kind")}
[ -f "$image" ] || die "no kernel $kind; 'make build KERNEL=$kind' builds it"
need_disk "$build" 3

mkdir -p "$build/vm" "$build/log"
run=$(mktemp -d "$build/vm/$kind.XXXXXX")
scratch+=("$run")
console=$build/log/console-$(basename "$run").log

make_initramfs() {
	local root=$run/root

	mkdir -p "$root"/{bin,proc,sys,dev,lower,upper,root}
	cp /bin/busybox "$root/bin/"
	ln -s busybox "$root/bin/sh"
	cp "$lab/guest/init" "$root/init"
	chmod +x "$root/init"
	(cd "$root" && find . | cpio -o -H newc --quiet) | gzip -1 >"$run/initrd"
	rm -rf "$root"
}

# What runs in the guest: the caller's directory and settings, then its command.
make_entry() {
	printf '%s' "$cmd" >"$run/cmd"
	{
		echo "cd $(printf %q "$PWD") 2>/dev/null || cd /"
		printf 'export %s=%q\n' HOME "$HOME" PATH "/usr/local/sbin:/usr/sbin:/sbin:$PATH" \
			TERM "${TERM:-dumb}"
		while IFS= read -r name; do
			printf 'export %s=%q\n' "$name" "${!name}"
		done < <(compgen -e | grep -E '^PT_' || true)
		[ "$icount" = 0 ] || echo "export PT_ICOUNT_SHIFT=1"
		if [ -n "$cmd" ]; then
			echo "bash $run/cmd"
		else
			echo "bash -i"
		fi
		echo "echo \$? >$run/status"
	} >"$run/enter"
}

# 46 bits of physical address, for memslots beyond the 1 TiB that TCG defaults to.
machine() {
	if [ "$icount" != 0 ]; then
		cpus=1
		echo "-accel tcg,thread=single -icount shift=1,sleep=off -cpu max,phys-bits=46"
	elif can_use_kvm; then
		echo "-accel kvm -cpu host"
	else
		echo "-accel tcg,thread=multi -cpu max,phys-bits=46"
	fi
}

nodes() {
	local mib=${mem%?} half=$((cpus / 2))

	[ "${mem: -1}" = M ] || mib=$((mib * 1024))
	if [ "$cpus" -lt 2 ] || [ "$icount" != 0 ]; then
		echo "-smp 1 -m $mem"
		return
	fi
	echo "-smp $cpus,sockets=$cpus,cores=1,threads=1 -m $mem" \
		"-object memory-backend-ram,id=m0,size=$((mib / 2))M" \
		"-object memory-backend-ram,id=m1,size=$((mib / 2))M" \
		"-numa node,nodeid=0,memdev=m0,cpus=0-$((half - 1))" \
		"-numa node,nodeid=1,memdev=m1,cpus=$half-$((cpus - 1))"
}

disks() {
	truncate -s 6G "$run/tmp.img"
	mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 "$run/tmp.img" ||
		die "no scratch disk could be made"
	truncate -s 1G "$run/swap.img"
	echo "-drive file=$run/tmp.img,format=raw,if=virtio,cache=unsafe" \
		"-drive file=$run/swap.img,format=raw,if=virtio,cache=unsafe"
}

# A command's output goes to our stdout as it is; stdin would end the port.
terminal() {
	echo "-device virtio-serial-pci"
	if [ -n "$cmd" ]; then
		echo "-add-fd fd=3,set=1 -chardev file,id=io,path=/dev/fdset/1,append=on"
		echo "-device virtserialport,chardev=io,nr=1"
	else
		echo "-chardev stdio,id=io,signal=off -device virtconsole,chardev=io"
	fi
}

# The complaints of a kernel that fail a run, whatever the command said.
splats() {
	grep -aE -A 25 'BUG:|BUG at|WARNING:|KASAN|KCSAN|UBSAN|Oops|general protection fault|possible (recursive locking|circular locking|irq lock)|inconsistent lock state|suspicious RCU|rcu.*(stall|detected)|blocked for more than|soft lockup|hard LOCKUP|Bad page|bad: (rss|pte)|Bad rss|BUG_ON|sleeping function called|kernel panic|Kernel panic|unable to handle|kmemleak: [1-9]|lockdep.*turning off|INFO: (task|trying)|lab: no' \
		"$console"
}

make_initramfs
make_entry
declare -a opts
read -ra opts <<<"$(machine) $(disks) $(terminal | tr '\n' ' ') ${QEMU_OPTS:-}"
[ "$icount" = 0 ] || cpus=1
read -ra size <<<"$(nodes)"
share() {
	printf '%s\n' -fsdev "local,id=$1,path=$2,security_model=none,multidevs=remap${3:-}" \
		-device "virtio-9p-pci,fsdev=$1,mount_tag=$1"
}
mapfile -t shares < <(share root / ,readonly=on; share build "$build")

[ -n "$cmd" ] || timeout=100000000
status=0
input=/dev/stdin
[ -z "$cmd" ] || input=/dev/null
timeout --foreground "$timeout" qemu-system-x86_64 -display none -monitor none -no-reboot \
	-machine q35 -nodefaults -serial "file:$console" "${opts[@]}" "${size[@]}" "${shares[@]}" \
	-kernel "$image" -initrd "$run/initrd" \
	-append "console=ttyS0 panic=-1 loglevel=7 lab.run=$run lab.top=$top lab.cwd=$PWD ${APPEND:-}" \
	<"$input" 3>&1 2>"$run/qemu.err" || status=$?

if [ "$status" = 124 ]; then
	echo "error: time was up after $timeout s (TIMEOUT=)" >&2
	splats >&2 || true
	exit 124
fi
if found=$(splats); then
	printf 'error: the kernel complained (%s):\n%s\n' "${console#"$top"/}" "$found" >&2
	[ "$(cat "$run/status" 2>/dev/null || echo 0)" != 0 ] || exit 99
fi
if [ ! -s "$run/status" ]; then
	cat "$run/qemu.err" >&2
	tail -n 5 "$console" >&2
	echo "error: the kernel died before the command ended (${console#"$top"/})" >&2
	exit 99
fi
exit "$(cat "$run/status")"
