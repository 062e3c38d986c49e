#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# tree.sh stock|patched: make or refresh build/src/KIND.
# tree.sh edit:          make build/edit, a patched tree under quilt.
# tree.sh save:          copy new files that were edited there back.
#
# KERNEL_SRC=DIR: base on this tree instead of the download; it is only read.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/base
. "$lab/base"

src=$build/src
py=/usr/bin/python3

# The files of a user's tree that are sources: what git tracks, or everything
# but what a build in place leaves behind.  NUL-separated, relative to it.
list_source() {
	local root

	root=$(git -c safe.directory='*' -C "$1" rev-parse --show-toplevel 2>/dev/null) || root=""
	if [ "$root" = "$(cd "$1" && pwd -P)" ]; then
		git -c safe.directory='*' -C "$1" ls-files -z
	else
		(cd "$1" && find . -name .git -prune -o \( -type f -o -type l \) \
			! -name '*.o' ! -name '*.a' ! -name '*.ko' ! -name '*.mod' ! -name '.*.cmd' \
			! -path ./vmlinux ! -path ./.config ! -path ./.config.old -print0)
	fi
}

# What identifies the base.  A user's tree changes: its files' sizes and times
# are part of its name.
base_id() {
	if [ -n "${KERNEL_SRC:-}" ]; then
		echo "dir $(cd "$KERNEL_SRC" && pwd -P) $(list_source "$KERNEL_SRC" |
			(cd "$KERNEL_SRC" && xargs -0 stat -c '%n %s %Y %f' 2>/dev/null; true) |
			sha256sum | cut -c 1-16)"
	else
		echo "deb $(basename "$1")"
	fi
}

version_of() {
	awk '/^(VERSION|PATCHLEVEL) =/ { v = v s $3; s = "." } END { print v }' "$1/Makefile"
}

check_source() {
	[ -d "$1" ] || die "KERNEL_SRC=$1: no such directory"
	[ -f "$1/mm/memory.c" ] || die "KERNEL_SRC=$1: not a kernel tree"
	[ "$(version_of "$1")" = "$SERIES" ] && return 0
	[ "${KERNEL_FORCE:-0}" = 1 ] ||
		die "KERNEL_SRC=$1 is Linux $(version_of "$1"), the series is for $SERIES.y (KERNEL_FORCE=1 tries anyway)"
}

# A user's tree as its sources are.  What a build in place generated next to
# them would be used in place of what ours generates: hence mrproper.
copy_source() {
	step "copying $1"
	list_source "$1" | rsync -a --files-from=- --from0 --ignore-missing-args "$1/" "$2/"
	if [ -d "$2/include/config" ] || [ -d "$2/include/generated" ]; then
		make -s -C "$2" mrproper >/dev/null
	fi
}

extract() {
	local log=$src/extract.log

	step "unpacking $(basename "$1")"
	(
		dpkg-deb --fsys-tarfile "$1" |
			tar -xO --wildcards "./usr/src/$PACKAGE.tar.xz" |
			tar -xJ --strip-components=1 -C "$2"
	) 2>"$log" || die "$(basename "$1") could not be unpacked: $(tail -n 1 "$log")"
}

make_stock() {
	local deb="" id part

	need rsync=rsync xz=xz-utils patch=patch git=git make=make /usr/bin/python3=python3
	if [ -n "${KERNEL_SRC:-}" ]; then
		check_source "$KERNEL_SRC"
	else
		deb=$("$lab/fetch.sh")
	fi
	id=$(base_id "$deb")
	[ "$(cat "$src/stock.id" 2>/dev/null)" != "$id" ] || return 0
	need_disk "$src" 6
	rm -f "$src/stock.id"
	part=$src/stock.part
	rm -rf "$part"
	mkdir -p "$part"
	scratch+=("$part")
	if [ -n "$deb" ]; then
		extract "$deb" "$part"
	else
		copy_source "$KERNEL_SRC" "$part"
	fi
	if [ -d "$src/stock" ]; then
		# Keep the time stamps of what did not change, for make.
		rsync -rlp --checksum --delete "$part/" "$src/stock/"
	else
		mv "$part" "$src/stock"
	fi
	echo "$id" >"$src/stock.id"
}

# Bring build/src/patched to stock + series, touching only what changes.
make_patched() {
	local staged=$src/staged

	make_stock
	if [ "$(cat "$src/patched.id" 2>/dev/null)" != "$(cat "$src/stock.id")" ]; then
		need_disk "$src" 3
		rm -f "$src/patched.id"
		step "copying the stock tree"
		if [ -d "$src/patched" ]; then
			rsync -a --delete "$src/stock/" "$src/patched/"
		else
			rm -rf "$src/patched.part"
			scratch+=("$src/patched.part")
			cp -a --reflink=auto "$src/stock" "$src/patched.part"
			mv "$src/patched.part" "$src/patched"
		fi
		rm -f "$src/patched.files"
		cp "$src/stock.id" "$src/patched.id"
	fi
	rm -rf "$staged"
	mkdir -p "$staged"
	scratch+=("$staged")
	$py "$lab/compose.py" stage --base "$src/stock" --out "$staged"
	# What an earlier series touched and this one does not is stock again.
	touch "$src/patched.files"
	while read -r file; do
		[ ! -e "$staged/$file" ] || continue
		if [ -e "$src/stock/$file" ]; then
			cp "$src/stock/$file" "$src/patched/$file"
		else
			rm -f "$src/patched/$file"
		fi
	done <"$src/patched.files"
	(cd "$staged" && find . -type f | sed 's,^\./,,') >"$src/patched.files"
	rsync -r --checksum "$staged/" "$src/patched/"
}

make_edit() {
	need quilt=quilt
	make_stock
	need_disk "$build" 3
	[ ! -e "$build/edit" ] || die "build/edit exists: 'make tree-save' what you want to keep, then remove it"
	step "copying the stock tree to build/edit"
	rm -rf "$build/edit.part"
	scratch+=("$build/edit.part")
	cp -a --reflink=auto "$src/stock" "$build/edit.part"
	ln -s "$top/patches" "$build/edit.part/patches"
	cat >"$build/edit.part/.quiltrc" <<-EOF
		QUILT_REFRESH_ARGS="--no-timestamps --no-index -p ab"
		QUILT_DIFF_OPTS="-p"
	EOF
	(cd "$build/edit.part" && quilt --quiltrc .quiltrc push -aq >/dev/null) ||
		die "the series does not apply; 'make check' names the patch"
	$py "$lab/compose.py" list | while IFS=$'\t' read -r from to; do
		[ "$from" = MAINTAINERS ] && continue
		mkdir -p "$(dirname "$build/edit.part/$to")"
		cp "$top/$from" "$build/edit.part/$to"
	done
	touch "$build/edit.part/.prepared"
	mv "$build/edit.part" "$build/edit"
	cat >&2 <<-EOF
		build/edit is the patched kernel, all patches pushed, patches/ linked to ours:
		  cd build/edit; alias q='quilt --quiltrc .quiltrc'
		  q pop mm/…    go to the patch to change; edit; q refresh; q push -a
		A hook is written back by 'q refresh'; a new file by 'make tree-save'.
	EOF
}

save_edit() {
	[ -d "$build/edit" ] || die "there is no build/edit; 'make tree' makes it"
	$py "$lab/compose.py" list | while IFS=$'\t' read -r from to; do
		[ "$from" != MAINTAINERS ] || continue
		if [ -e "$build/edit/$to" ] && ! cmp -s "$build/edit/$to" "$top/$from"; then
			[ "$build/edit/$to" -nt "$build/edit/.prepared" ] || {
				step "note: $from was edited here and not in build/edit: kept as it is"
				continue
			}
			[ ! "$top/$from" -nt "$build/edit/.prepared" ] ||
				die "$from was edited here and in build/edit: merge the two by hand"
			cp "$build/edit/$to" "$top/$from"
			step "saved $from"
		fi
	done
	check_edit
}

# An edit that quilt was not told of, or a new file that no patch brings, would
# be lost.
check_edit() {
	local known lost

	known=$(sed -n 's,^--- a/\([^[:blank:]]*\).*,\1,p' "$top"/patches/*/*.patch
		$py "$lab/compose.py" list | cut -f 2)
	lost=$(cd "$build/edit" && find . -name .pc -prune -o -type f -newer .prepared -print |
		sed 's,^\./,,' | grep -vxF -e "$known" | tr '\n' ' ') || true
	[ -z "$lost" ] ||
		die "not saved, for no patch has it: ${lost% } ('quilt add' a file before editing it; name a new one in New-files: of a patch)"
}

lock tree
case ${1:-} in
stock) make_stock ;;
patched) make_patched ;;
edit) make_edit ;;
save) save_edit ;;
*) die "usage: tree.sh stock|patched|edit|save" ;;
esac
