#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# qemu_build.sh: build the QEMU of patches/qemu, which knows sparse memslots; print the
# directory of qemu-system-x86_64.
#
# The source is a package of Debian, named in tools/lab/qemu_base and fetched like the
# base kernel.  What is built is what `make e2e` needs, for KVM alone; firmware is that of
# the QEMU which qemu.sh finds.  It is kept in the cache directory, by the identity of the
# source, of the patches and of this script: a second call builds nothing.
. "$(dirname "$0")/lib.sh"
# shellcheck source=tools/lab/qemu_base
. "$lab/qemu_base"
# shellcheck source=tools/lab/apt.sh
. "$lab/apt.sh"

dir=$cache/qemu-sparse
work=$dir/work
log=$build/log/qemu-build.log
# When the pinned version has left the mirror: what was taken in its place.
newer=$dir/instead-of-$QEMU_VERSION
patches=("$top/patches/qemu/$QEMU_SERIES"/*.patch)

# Boards and devices; what they cannot be without comes by itself.
devices() {
	printf 'CONFIG_%s=y\n' Q35 VIRTIO_PCI VIRTIO_MEM VIRTIO_SERIAL VIRTIO_BALLOON VHOST_USER_BLK
}

configuration() {
	printf '%s\n' --target-list=x86_64-softmmu --without-default-features \
		--without-default-devices --with-devices-x86_64=lab --enable-kvm --disable-tcg \
		--enable-vhost-user --disable-docs --disable-install-blobs --disable-download \
		--disable-debug-info
}

# Directories, the first that has a file serves.
firmware() {
	"$qemu/qemu-system-x86_64" -L help | awk '!seen[$0]++'
}

identity() {
	{
		echo "$1"
		firmware
		cat "${patches[@]}" "$0"
	} | sha256sum | cut -c 1-12
}

# use VERSION: end the script if there is the program, and starts.
use() {
	local out

	out=$dir/$(identity "$1")
	"$out/qemu-system-x86_64" --version >/dev/null 2>&1 || return 0
	[ "$1" = "$QEMU_VERSION" ] || announce_newer "$1"
	echo "$out"
	exit 0
}

announce_newer() {
	step "note: qemu $QEMU_VERSION has left the mirror, using $1 in its place"
}

from_cache() {
	local version

	use "$QEMU_VERSION"
	if [ -f "$newer" ] && read -r version <"$newer"; then
		use "$version"
	fi
}

read_index() {
	local mirror

	mirror=${DEBIAN_MIRROR:-$(machine_mirror)}
	[ -n "$mirror" ] ||
		die "no Debian mirror in this machine's apt configuration: name one with DEBIAN_MIRROR=<url>"
	step "reading the index of $QEMU_SUITE"
	# What is installed is of no interest.
	mkdir -p "$dir/apt"
	: >"$dir/apt/status"
	private_apt "$dir/apt" "$dir/apt/status" "$mirror" "$QEMU_SUITE"
	sed -i 'p; s/^deb /deb-src /' "$dir/apt/sources.list"
	apt-get -c "$dir/apt/apt.conf" -q -o APT::Update::Error-Mode=any update >"$log" 2>&1 </dev/null ||
		die "cannot read the index of $QEMU_SUITE: $(archive_reason "$log" "$QEMU_SUITE")"
}

# Sets want: the pinned version, or else the newest of the series.
choose() {
	local versions

	versions=$(apt-cache -c "$dir/apt/apt.conf" madison qemu |
		awk -F ' *[|] *' '/ Sources$/ { print $2 }')
	want=$QEMU_VERSION
	if grep -qxF "$want" <<<"$versions"; then
		return 0
	fi
	want=$(grep -m1 "^1:${QEMU_SERIES//./\\.}\\." <<<"$versions") ||
		die "$QEMU_SUITE on the machine's mirror has no QEMU $QEMU_SERIES"
	echo "$want" >"$newer"
	use "$want"
	announce_newer "$want"
}

# The source, and meson: QEMU wants one that is newer than Debian 12's, and brings its
# own, but not in Debian's package.  apt checks both by the signed index.
download() {
	local apt="apt-get -c $dir/apt/apt.conf -q" dsc

	step "downloading the source of QEMU $want"
	mkdir -p "$work/files"
	(
		cd "$work/files"
		$apt --download-only --only-source source "qemu=$want" && $apt download meson
	) >"$log" 2>&1 </dev/null ||
		die "cannot download QEMU $want: $(archive_reason "$log" "$QEMU_SUITE")"
	dsc=$(find "$work/files" -name '*.dsc')
	[ "$want" != "$QEMU_VERSION" ] || [ "$(sha256sum <"$dsc" | cut -d ' ' -f 1)" = "$QEMU_SHA256" ] ||
		die "${dsc##*/} has not the checksum $QEMU_SHA256 (see tools/lab/qemu_base): try again; if it stays, distrust the mirror"
}

# With Debian's patches, then ours.
unpack() {
	local patch

	dpkg-source --no-check --require-strong-checksums -x "$work"/files/*.dsc "$work/src" >"$log" 2>&1 ||
		die "the source of QEMU could not be unpacked: $(tail -n 1 "$log")"
	for patch in "${patches[@]}"; do
		patch -p1 -f -F0 --no-backup-if-mismatch -r - -d "$work/src" <"$patch" >"$log" 2>&1 ||
			die "patches/qemu/$QEMU_SERIES/${patch##*/} does not apply to QEMU $want: $(grep -m1 -E 'FAILED|malformed|previously' "$log")"
	done
	devices >"$work/src/configs/devices/x86_64-softmmu/lab.mak"
	dpkg-deb -x "$work"/files/meson_*.deb "$work/meson" 2>"$log" ||
		die "meson could not be unpacked: $(tail -n 1 "$log")"
}

compile() {
	local options began=$SECONDS

	export CCACHE_DIR=$cache/ccache CCACHE_BASEDIR=$work CCACHE_MAXSIZE=10G
	export PYTHONPATH=$work/meson/usr/lib/python3/dist-packages
	mapfile -t options < <(configuration)
	mkdir "$work/build"
	cd "$work/build"
	step "building QEMU $want (log: build/log/qemu-build.log)"
	../src/configure --python=/usr/bin/python3 --cc="ccache gcc" "${options[@]}" >"$log" 2>&1 </dev/null ||
		die "QEMU cannot be configured: $(grep -m1 -E 'ERROR' "$log" || tail -n 1 "$log")"
	nice ninja -j"$(nproc)" qemu-system-x86_64 >>"$log" 2>&1 </dev/null ||
		die "the build of QEMU failed: $(grep -m1 -E 'error:|No space left' "$log" || tail -n 1 "$log")"
	cd "$top"
	step "built QEMU in $((SECONDS - began)) s"
}

# put DIR: the program, and a wrapper that tells it where firmware is.
put() {
	local part=$work/result place places=""

	mkdir "$part"
	mv "$work/build/qemu-system-x86_64" "$part/program"
	while IFS= read -r place; do
		places+="-L $(printf %q "$place") "
	done < <(firmware)
	cat >"$part/qemu-system-x86_64" <<-END
	#!/bin/bash
	exec -a qemu-system-x86_64 $(printf %q "$1/program") $places"\$@"
	END
	chmod +x "$part/qemu-system-x86_64"
	rm -rf "$1"
	mv "$part" "$1"
	"$1/qemu-system-x86_64" --version >/dev/null 2>"$log" ||
		die "the QEMU that was built does not start: $(tail -n 1 "$log")"
}

mkdir -p "$dir" "$build/log" 2>/dev/null || die "cannot create $dir: check permissions and free disk, or set XDG_CACHE_HOME"
qemu=$("$lab/qemu.sh")
# One at a time, for all checkouts share the cache.
exec 8>"$dir/.lock"
flock 8
from_cache
need gcc=gcc ninja=ninja-build ccache=ccache pkg-config=pkgconf patch=patch xz=xz-utils \
	apt-get=apt dpkg-source=dpkg-dev /usr/bin/python3=python3 /usr/include/stdio.h=libc6-dev \
	/usr/include/glib-2.0/glib.h=libglib2.0-dev /usr/include/zlib.h=zlib1g-dev \
	/usr/include/libfdt.h=libfdt-dev \
	/usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring
need "$(/usr/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')/ensurepip/__init__.py=python3-venv"
need_disk "$dir" 2
rm -rf "$work"
scratch+=("$work")
mkdir "$work"
read_index
choose
download
unpack
compile
out=$dir/$(identity "$want")
put "$out"
echo "$out"
