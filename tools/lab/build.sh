#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# build.sh KIND: build the kernel build/kernel/KIND/arch/x86/boot/bzImage.
. "$(dirname "$0")/lib.sh"

kind=${1:-}
check_kind "$kind"
out=$build/kernel/$kind
log=$build/log/build-$kind.log

need gcc=gcc make=make flex=flex bison=bison bc=bc ccache=ccache cpio=cpio \
	/usr/include/libelf.h=libelf-dev /usr/include/openssl/ssl.h=libssl-dev \
	/usr/include/stdio.h=libc6-dev
"$lab/tree.sh" "$(tree_of "$kind")"
lock "kernel-$kind"
need_disk "$build" 2
mkdir -p "$out" "$build/log"

# A second checkout on this machine starts warm: paths below the checkout are
# hashed relative to it, and nothing that differs by build is compiled in.
export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR=$top CCACHE_NOHASHDIR=1
export CCACHE_DEPEND=1 CCACHE_MAXSIZE=10G
export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab

kmake() {
	make -C "$build/src/$(tree_of "$kind")" O="$out" CC="ccache gcc" "$@"
}

fragments() {
	cat "$lab/config/base.config"
	case $kind in
	*debug) cat "$lab/config/debug.config" ;;
	esac
	[ "$kind" != debug ] || cat "$lab/config/kunit.config"
	# Another base or another Kconfig makes another .config from these.
	sed 's/^/# base: /' "$build/src/stock.id"
	case $kind in
	stock*) ;;
	*) (cd "$build/src/patched" && grep Kconfig ../patched.files |
		xargs -r sha256sum | sed 's/^/# /') ;;
	esac
}

# Kconfig drops what it does not know or whose dependencies fail, silently.
check_config() {
	local line name value

	fragments | grep '^CONFIG_' | while IFS= read -r line; do
		name=${line%%=*} value=${line#*=}
		if [ "$value" = n ]; then
			! grep -q "^$name=" "$out/.config" ||
				die "tools/lab/config: $name=n did not take effect"
		else
			grep -qxF "$line" "$out/.config" ||
				die "tools/lab/config: $line did not take effect"
		fi
	done
}

configure() {
	fragments >"$out/fragments.new"
	if [ -e "$out/.config" ] && cmp -s "$out/fragments.new" "$out/fragments"; then
		rm "$out/fragments.new"
		return
	fi
	step "configuring $kind"
	rm -f "$out/fragments"
	kmake -s KCONFIG_ALLCONFIG="$out/fragments.new" allnoconfig >"$log" 2>&1 ||
		die "the configuration failed: $log"
	check_config
	mv "$out/fragments.new" "$out/fragments"
}

# Lines "CC file" of the log against those of the last full build: a line that
# is written over on a terminal, a line now and then elsewhere.  Ends with the
# script, however that ends.
progress() {
	local total n every=30 end='\n'

	if [ -t 2 ]; then every=2 end='\r'; fi
	total=$(cat "$count" 2>/dev/null || echo 1900)
	# The sleep may outlive us a little: it must not hold our lock or output.
	while sleep "$every" >/dev/null 2>&1 {lock_fd}>&- {terminal_fd}>&- && kill -0 $$ 2>/dev/null; do
		n=$(grep -c '^  [A-Z]' "$log") || true
		if [ "$n" -ge 20 ]; then
			# shellcheck disable=SC2059  # the end is an escape
			printf "   %s: %s of about %s$end" "$kind" "$n" "$total" >&2
		fi
	done
}

# What the compiler or make complained of, the rest being in the log.
complaints() {
	grep -E -A 6 '(error|undefined reference|No space left).*|\*\*\*' "$log" | head -n 30 || true
}

count=$cache/objects-$kind
configure
step "building $kind (log: build/log/build-$kind.log)"
began=$SECONDS
progress &
ticker=$!
status=0
kmake -j"$(nproc)" bzImage >"$log" 2>&1 </dev/null || status=$?
kill "$ticker" 2>/dev/null || true
wait "$ticker" 2>/dev/null || true
if [ "$status" -ne 0 ]; then
	complaints >&2
	die "the build of $kind failed: $log"
fi
lines=$(grep -c '^  [A-Z]' "$log") || true
[ "$lines" -lt 1000 ] || echo "$lines" >"$count"
step "built $kind in $((SECONDS - began)) s"
