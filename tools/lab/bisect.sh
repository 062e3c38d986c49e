#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# bisect.sh: that every patch of the series builds on its own.
#
# Brings a tree in build/bisect to each patch in turn and makes what the series touches
# of it (objects.sh has what that is), where a warning is an error, in three
# configurations
#
#   on    the release kernel, and every C file that the series touches
#   off   the same without PT_RECLAIM, with DEBUG_VM and KVM's assertions
#   bare  PT_RECLAIM, and as little as can be of all else that knows page tables
#
# and the selftests that have arrived by then.  Nothing is linked.  A line for each patch:
# how many objects were compiled, "=" where there was nothing to do after the patch
# before, "kept" where this was done before: what went well is not done again, and an
# interrupted run goes on where it stopped.  The first failure ends it: one line names
# patch and file, exit status 1.
#
# FROM=, TO=: numbers of patches, the first is 1.  QUICK=1: only the files that each patch
# touches, not others that include them.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/objects.sh
. "$lab/objects.sh"

need gcc=gcc make=make flex=flex bison=bison bc=bc ccache=ccache git=git rsync=rsync \
	patch=patch /usr/bin/python3=python3 /usr/include/libelf.h=libelf-dev \
	/usr/include/openssl/ssl.h=libssl-dev /usr/include/stdio.h=libc6-dev \
	/usr/include/sys/capability.h=libcap-dev /usr/include/numa.h=libnuma-dev
"$lab/tree.sh" stock
lock bisect
stock=$build/src/stock
work=$build/bisect
src=$work/src
repo=$work/series/git
need_disk "$work" 4
mkdir -p "$work/kept"
export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR=$top CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=10G

# The composed series as commits: commits[0] is the base, commits[n] is patch n.
compose() {
	rm -rf "$work/series"
	/usr/bin/python3 "$lab/compose.py" series --base "$stock" --out "$work/series" >/dev/null
	mapfile -t commits < <(git -C "$repo" rev-list --reverse HEAD)
	last=$((${#commits[@]} - 1))
	series_files=$(changed "${commits[0]}" "${commits[last]}")
}

# changed FROM TO [PATHSPEC…]: the files.
changed() {
	local range=("$1" "$2")

	shift 2
	git -C "$repo" diff --name-only --no-renames "${range[@]}" -- "$@"
}

# A copy of the stock tree, which files of the series are put into.
prepare_tree() {
	[ "$(cat "$work/src.id" 2>/dev/null)" != "$(cat "$build/src/stock.id")" ] || return 0
	step "copying the stock tree to build/bisect"
	rm -rf "$src" "$src.part" "$work/src.id" "$work/src.files"
	scratch+=("$src.part")
	cp -a --reflink=auto "$stock" "$src.part"
	mv "$src.part" "$src"
	cp "$build/src/stock.id" "$work/src.id"
}

# check_out N: bring the tree to patch N; what does not change keeps its time stamp.
# src.files has what this series or an earlier one may have put there.
check_out() {
	local file files

	touch "$work/src.files"
	files=$({ cat "$work/src.files"; echo "$series_files"; } | sort -u)
	echo "$files" >"$work/src.files"
	git -C "$repo" checkout -qf "${commits[$1]}"
	while read -r file; do
		[ ! -e "$repo/$file" ] || continue
		if [ ! -e "$stock/$file" ]; then
			rm -f "$src/$file"
		elif ! cmp -s "$stock/$file" "$src/$file"; then
			cp "$stock/$file" "$src/$file"
		fi
	done <<<"$files"
	rsync -r --checksum --exclude=/.git "$repo/" "$src/"
}

fragments() {
	case $1 in
	on) cat "$lab"/config/{base,bisect}.config ;;
	*) cat "$lab"/config/{base,bisect,"bisect-$1"}.config ;;
	esac
}

# key WHAT N: a name for everything that the result depends on.
key() {
	local paths=(. ':!tools' ':!Documentation' ':!MAINTAINERS')

	[ "$1" != selftests ] || paths=(tools 'include/uapi' 'arch/*/include/uapi')
	{
		cat "$work/src.id"
		gcc --version
		[ "$1" = selftests ] || {
			fragments "$1"
			[ -z "${QUICK:-}" ] || changed "${commits[$2 - 1]}" "${commits[$2]}" "${paths[@]}"
		}
		git -C "$repo" diff --raw --no-abbrev --no-renames \
			"${commits[0]}" "${commits[$2]}" -- "${paths[@]}"
	} | sha256sum | cut -c 1-32
}

# kmake CONFIGURATION…
kmake() {
	local config=$1 kconfig=()

	shift
	[ "$config" != off ] || kconfig=(KBUILD_KCONFIG="$work/Kconfig.off")
	make -C "$src" O="$work/$config" CC="ccache gcc" "${kconfig[@]}" -j"$(nproc)" "$@" </dev/null
}

# configuration NAME: all that makes another .config.
configuration() {
	cat "$work/src.id" "$work/$1/fragments"
	(cd "$src" && grep Kconfig <<<"$series_files" | xargs -r cat)
}

# Kconfig drops what it does not know, which in early patches is as it should be.
# That all of bisect.config took effect is seen by what it compiles.
configure() {
	local done=$work/$1/configured reclaim=n want=y

	mkdir -p "$work/$1"
	fragments "$1" >"$work/$1/fragments"
	configuration "$1" >"$done.new"
	! cmp -s "$done.new" "$done" || return 0
	rm -f "$done"
	without_reclaim "$src" >"$work/Kconfig.off"
	kmake "$1" -s KCONFIG_ALLCONFIG="$work/$1/fragments" allnoconfig || return
	[ "$1" != off ] || want=n
	! configured "$work/$1/.config" PT_RECLAIM || reclaim=y
	[ "$reclaim" = "$want" ] || {
		echo "error: CONFIG_PT_RECLAIM=$want did not take effect"
		return 1
	}
	mv "$done.new" "$done"
}

# wanted CONFIGURATION N: the targets that are there in this tree.
wanted() {
	local target

	if [ -n "${QUICK:-}" ]; then
		quick "$1" "$2"
		return
	fi
	targets x86 "$work/$1/.config" <<<"$series_files" | while read -r target; do
		[[ $target = *.o && ! -e $src/${target%.o}.c ]] || echo "$target"
	done
}

# compiles CONFIGURATION FILE: if not, the line of the Makefile that names its object
# names an option.
compiles() {
	local option

	case $2 in
	virt/kvm/*|arch/x86/kvm/*) configured "$work/$1/.config" KVM || return ;;
	esac
	option=$(cat "$src/${2%/*}"/Makefile* 2>/dev/null |
		sed -nE "s,^[^#]*\(CONFIG_(\w+)\).*[ /]$(basename "$2" .c)\.o( .*)?$,\1,p")
	[ -z "$option" ] || configured "$work/$1/.config" "$option"
}

# quick CONFIGURATION N: the objects of what the patch touches.
quick() {
	local file

	changed "${commits[$2 - 1]}" "${commits[$2]}" | sources x86 | while read -r file; do
		compiles "$1" "$file" || continue
		case $file in
		virt/kvm/*) echo "arch/x86/kvm/../../../${file%.c}.o" ;;
		*) echo "${file%.c}.o" ;;
		esac
	done
}

# All that the series touches has to be compiled at least once, that is, in "on".
# An option may come with a later patch than its code.
check_coverage() {
	local file

	sources x86 <<<"$series_files" | while read -r file; do
		[ -e "$work/on/${file%.c}.o" ] ||
			echo "error: $file is not compiled: tools/lab/config/bisect.config"
	done
}

# build_kernel CONFIGURATION N
build_kernel() {
	local list

	configure "$1" || return
	mapfile -t list < <(wanted "$1" "$2")
	[ ${#list[@]} -gt 0 ] || return 0
	kmake "$1" "${list[@]}" || return
	[ "$1$2" != "on$last" ] || [ -n "${QUICK:-}" ] || check_coverage
}

# The programs of one directory of selftests, of the C files that the series has so far.
# Their headers are not tracked in all of them.
build_programs() {
	local dir=tools/testing/selftests/$1 out=$work/selftests/$1 programs

	mapfile -t programs < <(changed "${commits[0]}" "${commits[$2]}" "$dir/*.c" |
		sed -n "s,^$dir/\(.*\)\.c$,$out/\1,p")
	[ ${#programs[@]} -gt 0 ] || return 0
	mkdir -p "$out"
	rm -f "${programs[@]}" "${programs[@]/%/.o}"
	make -C "$src/$dir" OUTPUT="$out" EXTRA_CFLAGS=-Werror -j"$(nproc)" \
		KHDR_INCLUDES="-isystem $work/headers/usr/include" "${programs[@]}" </dev/null ||
		return
	printf 'program: %s\n' "${programs[@]}"
}

build_selftests() {
	changed "${commits[0]}" "${commits[$1]}" 'tools/testing/selftests/*.c' | grep -q . || return 0
	make -s -C "$src" O="$work/headers" ARCH=x86 headers &&
		build_programs mm "$1" && build_programs kvm "$1"
}

# build WHAT N: sets result to what was done; what fails ends everything.
build() {
	local log=$build/log/bisect-$1.log kept

	kept=$work/kept/$(key "$1" "$2")
	if [ -e "$kept" ]; then
		result=kept
		[ "${kept##*/}" != "$(key "$1" "$(($2 - 1))")" ] || result='='
		return
	fi
	check_out "$2"
	case $1 in
	selftests) build_selftests "$2" ;;
	*) build_kernel "$1" "$2" ;;
	esac >"$log" 2>&1 || echo "error: make failed" >>"$log"
	! grep -qE '^error: ' "$log" ||
		die "patches/${names[$2]} (patch $2 of $last) does not build, $1: $(complaint "$log") (log: build/log/${log##*/})"
	case $1 in
	selftests) result=$(grep -c '^program: ' "$log" || true) ;;
	*) result=$(compiled "$log") ;;
	esac
	touch "$kept"
}

# What no compiler of this machine reads.
elsewhere() {
	changed "${commits[$1 - 1]}" "${commits[$1]}" | grep '^arch/' | grep -v '^arch/x86/' |
		cut -d / -f 2 | sort -u | tr '\n' ' ' || true
}

number() {
	[[ $2 =~ ^[1-9][0-9]*$ && $2 -le $last ]] ||
		die "$1=$2: the patches are 1 to $last"
}

mkdir -p "$build/log"
compose
prepare_tree
mapfile -t names < <(echo base; sed 's/#.*//' "$top/patches/series" | awk 'NF { print $1 }')
first=${FROM:-1}
final=${TO:-$last}
number FROM "$first"
number TO "$final"
began=$SECONDS
for ((n = first; n <= final; n++)); do
	line=
	since=$SECONDS
	for what in on off bare selftests; do
		build "$what" "$n"
		line+=" $what $result,"
	done
	other=$(elsewhere "$n")
	printf 'ok   %d/%d %s:%s %d s%s\n' "$n" "$last" \
		"$(git -C "$repo" log -1 --format=%s "${commits[n]}")" "$line" "$((SECONDS - since))" \
		"${other:+, not compiled: arch ${other% }}"
done
echo "patches $first to $final of $last build, each with page table reclaim on, off and bare, in $((SECONDS - began)) s"
