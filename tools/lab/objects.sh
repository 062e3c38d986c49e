# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What bisect.sh and arches.sh have in common: which parts of a kernel the series
# touches, and a kernel without what it does; sourced after lib.sh, never run.

# configured DOT-CONFIG OPTION
configured() {
	grep -qE "^CONFIG_$2=[ym]" "$1"
}

# targets ARCH DOT-CONFIG: what to make in a kernel for this directory of arch/ and of
# this configuration, of the files on standard input.  Directories are made as a whole,
# for a header is used by more files than were touched; of those that are large and
# hardly touched, the files.  fs/proc stands for the users of headers that are elsewhere.
targets() {
	local file

	while read -r file; do
		case $file in
		tools/*|Documentation/*) ;;
		mm/*.[ch]) echo mm/ ;;
		virt/kvm/*.[ch]|arch/"$1"/kvm/*.[ch]) ! configured "$2" KVM || echo "arch/$1/kvm/" ;;
		arch/*) ;;
		include/*.h) printf '%s\n' kernel/fork.o fs/proc/ ;;
		*.c) echo "${file%.c}.o" ;;
		esac
	done | sort -u
}

# sources ARCH: those of the files on standard input that such a kernel may compile.
sources() {
	local file

	while read -r file; do
		case $file in
		tools/*|Documentation/*) ;;
		arch/"$1"/*.c) echo "$file" ;;
		arch/*) ;;
		*.c) echo "$file" ;;
		esac
	done
}

# without_reclaim TREE: its Kconfig with PT_RECLAIM off, which has no prompt: the first
# definition of a default is the one that counts.
without_reclaim() {
	sed '/^mainmenu/a\
\
config PT_RECLAIM\
	def_bool n' "$1/Kconfig"
}

# What compilers say, with the kernel's paths.
plain_paths() {
	sed -E 's,[^ :[]*/src/((patched|stock)/)?,,g'
}

# complaint LOG: the first thing that a compiler, Kconfig or make complained of.
complaint() {
	{
		grep -vE '^  [A-Z]|^error: make failed' "$1" |
			grep -m1 -E '\<error\>|undefined reference|No space left' ||
			grep -m1 -F '***' "$1" || tail -n 1 "$1"
	} | plain_paths
}

# compiled LOG: how many objects.
compiled() {
	grep -cE '^  CC (\[M\])? ' "$1" || true
}
