#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# qemu.sh: make sure of a QEMU that can run Linux nested in TCG, 10 or newer, and
# of qemu-storage-daemon; print the directory of the two programs.
#
# That is the machine's own where it is new enough (Debian 13).  Elsewhere the
# packages of the release's backports, with those libraries that the machine has
# not, are unpacked in the cache directory and run from there: nothing is
# installed, no root is needed, and other users of QEMU keep theirs.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/apt.sh
. "$lab/apt.sh"

MINIMUM=10
dir=$cache/qemu
programs=(qemu-system-x86_64 qemu-storage-daemon)

# new_enough PROGRAM...: whether all of them start, and are.
new_enough() {
	local major program

	for program; do
		major=$("$program" --version 2>/dev/null |
			sed -nE '1s/.* version ([0-9]+)\..*/\1/p') || return 1
		[ "${major:-0}" -ge "$MINIMUM" ] || return 1
	done
}

release_name() {
	local codename

	# shellcheck source=/dev/null
	codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}") || true
	[ -n "$codename" ] ||
		die "QEMU $MINIMUM or newer is needed, and which release this is, /etc/os-release does not say"
	echo "$codename"
}

# A program of the unpacked tree, with its libraries and firmware.
make_wrapper() {
	local root=$dir/root firmware=""

	[ "$1" != qemu-system-x86_64 ] ||
		firmware="-L $(printf %q "$root/usr/share/qemu") -L $(printf %q "$root/usr/share/seabios") "
	cat >"$dir/bin/$1" <<-END
	#!/bin/bash
	export LD_LIBRARY_PATH=$(printf %q "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu")
	exec $(printf %q "$root/usr/bin/$1") $firmware"\$@"
	END
	chmod +x "$dir/bin/$1"
}

# What the machine has installed is not fetched again; a lock on its package
# state would want root, and nothing of it is changed.
download() {
	local release=$1 apt

	apt="apt-get -c $dir/apt/apt.conf -q -y -o Debug::NoLocking=1 -o APT::Update::Error-Mode=any"
	step "fetching QEMU from $release-backports"
	rm -rf "$dir/apt/archives"
	private_apt "$dir/apt" /var/lib/dpkg/status "$mirror" "$release" "$release-backports"
	$apt update >"$log" 2>&1 </dev/null ||
		die "cannot read the index of $release-backports: $(archive_reason "$log" "$release-backports")"
	$apt --download-only --no-install-recommends -t "$release-backports" \
		install qemu-system-x86 qemu-utils >"$log" 2>&1 </dev/null ||
		die "cannot download QEMU: $(archive_reason "$log" "$release-backports")"
}

unpack() {
	local deb part program

	part=$(mktemp -d "$dir/.root.XXXXXX")
	scratch+=("$part")
	for deb in "$dir"/apt/archives/*.deb; do
		dpkg-deb -x "$deb" "$part" 2>"$log" ||
			die "$(basename "$deb") could not be unpacked: $(tail -n 1 "$log")"
	done
	rm -rf "${dir:?}/root" "${dir:?}/bin"
	mkdir "$dir/bin"
	mv "$part" "$dir/root"
	for program in "${programs[@]}"; do
		make_wrapper "$program"
	done
}

# The machine has one in any case, to run our kernels.
need qemu-system-x86_64=qemu-system-x86
if new_enough qemu-system-x86_64; then
	need qemu-storage-daemon=qemu-utils
	dirname "$(command -v qemu-storage-daemon)"
	exit
fi
mkdir -p "$dir" 2>/dev/null || die "cannot create $dir: check permissions and free disk, or set XDG_CACHE_HOME"
# One at a time, for all checkouts share the cache.
exec 8>"$dir/.lock"
flock 8
if ! new_enough "${programs[@]/#/$dir/bin/}"; then
	need apt-get=apt /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
	need_disk "$dir" 1
	mirror=${DEBIAN_MIRROR:-$(machine_mirror)}
	[ -n "$mirror" ] ||
		die "no Debian mirror in this machine's apt configuration: name one with DEBIAN_MIRROR=<url>, or install QEMU $MINIMUM"
	log=$(mktemp)
	scratch+=("$log")
	release=$(release_name)
	download "$release"
	unpack
	new_enough "${programs[@]/#/$dir/bin/}" ||
		die "QEMU of $release-backports is older than $MINIMUM or does not start here: $("$dir/bin/qemu-system-x86_64" --version 2>&1 | head -n 1)"
fi
echo "$dir/bin"
