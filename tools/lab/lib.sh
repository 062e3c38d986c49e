# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What every script of the lab needs; sourced, never run.

set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034
lab=$top/tools/lab
build=$top/build
# shellcheck disable=SC2034
cache=${XDG_CACHE_HOME:-$HOME/.cache}/linux-sparse-guest
# shellcheck disable=SC2034  # used by the scripts that source this
kinds="stock patched debug stock-debug"

die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

step() {
	printf '== %s\n' "$*" >&2
}

# Files and directories named here vanish when the script ends, however it ends.
scratch=()
# shellcheck disable=SC2329  # called by the trap below
cleanup() {
	local status=$?

	trap - EXIT
	[ ${#scratch[@]} -eq 0 ] || rm -rf -- "${scratch[@]}"
	exit "$status"
}
trap cleanup EXIT

# Said once, by the script that the user started, and past any redirection that
# is in force when the signal arrives.
exec {terminal_fd}>&2
export LAB_LEVEL=$((${LAB_LEVEL:-0} + 1))
# shellcheck disable=SC2329  # called by the trap below
interrupted() {
	[ "$LAB_LEVEL" -gt 1 ] ||
		echo "interrupted; the same command continues where it can" >&"$terminal_fd"
	exit 130
}
trap interrupted INT TERM

# Never asks for a password: a build that waits at a prompt is worse than one
# that says what to do.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo -n "$@"
	fi
}

can_be_root() {
	[ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# is_missing WHAT: a command, or a file by its absolute path.
is_missing() {
	case $1 in
	/*) [ ! -e "$1" ] ;;
	# mkfs and its like are where users do not look.
	*) ! PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
	esac
}

apt_reason() {
	if grep -qE 'No space left on device|enough free space' "$1"; then
		echo "the disk is full"
	elif grep -qE 'Temporary failure resolving|Could not (resolve|connect)|Unable to connect|Network is unreachable|Connection (failed|timed out|refused)' "$1"; then
		echo "there is no network, or the mirror does not answer"
	else
		grep -m1 -E '^(E|Err|W):' "$1" || echo "see $1"
	fi
}

# need WHAT=PACKAGE...: install the packages whose command or file is missing.
# A machine that has them all needs neither root nor network.
need() {
	local pair missing=() log=$build/log/apt.log apt

	for pair; do
		! is_missing "${pair%%=*}" || missing+=("${pair#*=}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null ||
		die "missing, and there is no apt-get to install it (Debian's names): ${missing[*]}"
	can_be_root ||
		die "missing, and neither root nor sudo without a password: apt-get install ${missing[*]}"
	step "installing ${missing[*]}"
	mkdir -p "$build/log" 2>/dev/null || die "cannot create $build/log"
	apt="as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300"
	# One unreachable source among many must not keep the others from serving.
	$apt update >"$log" 2>&1 </dev/null ||
		step "apt-get update: $(apt_reason "$log"); going on with the lists at hand"
	$apt install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 </dev/null ||
		die "apt-get could not install ${missing[*]}: $(apt_reason "$log")"
}

# need_disk DIR GIB: refuse to start what would end with a full disk.
need_disk() {
	local free

	mkdir -p "$1" 2>/dev/null || die "cannot create $1"
	free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')
	[ "$free" -ge "$2" ] ||
		die "$1 has $free GiB of free disk, $2 GiB are needed"
}

check_kind() {
	case " $kinds " in
	*" $1 "*) ;;
	*) die "KERNEL=$1: there is no such kernel; choose from: $kinds" ;;
	esac
}

# lock NAME: one at a time in this checkout; waits for the other.
lock() {
	mkdir -p "$build"
	exec {lock_fd}>"$build/.lock-$1"
	flock -n "$lock_fd" || {
		step "waiting for another run that uses $1"
		flock "$lock_fd"
	}
}

tree_of() {
	case $1 in
	stock*) echo stock ;;
	*) echo patched ;;
	esac
}

image_of() {
	echo "$build/kernel/$1/arch/x86/boot/bzImage"
}

# Plain guests need hardware virtualisation; /dev/kvm alone does not promise it.
can_use_kvm() {
	grep -qwE 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ]
}

# use_qemu: have qemu.sh's QEMU come first.  The TCG of 7.2 is not for us: a nested
# Linux crashes at boot in it, and now and then a nested guest writes over the memory
# of the kernel under test.
use_qemu() {
	local dir

	dir=$("$lab/qemu.sh") || exit 1
	export PATH=$dir:$PATH
}

# describe: what is measured and on what, a "name: value" a line.
describe() {
	printf 'base: %s\n' "$(sed 's/^deb //' "$build/src/stock.id")"
	printf 'series: %s\n' "$(cat "$top"/patches/series "$top"/patches/*/*.patch | sha256sum | cut -c 1-12)"
	printf 'configuration: tools/lab/config/base.config, sha256 %s\n' \
		"$(sha256sum <"$lab/config/base.config" | cut -c 1-12)"
	printf 'compiler: %s\n' "$(gcc --version | head -n 1)"
	printf 'emulator: %s, %s\n' "$(qemu-system-x86_64 --version | head -n 1)" \
		"$(if can_use_kvm; then echo "KVM"; else echo "TCG, -icount shift=1 for costs"; fi)"
	printf 'processor: %s, %s of them\n' \
		"$(sed -n '0,/^model name/s/^model name[^:]*: //p' /proc/cpuinfo)" "$(nproc)"
}
