#!/bin/bash
# passthrough_hp.sh DESTINATION: builds libfuse's passthrough_hp from Debian's source package (3.18 or later: with io_uring).
# One file, linked statically with its own libfuse; the system's libfuse is neither needed nor touched.
set -euo pipefail
destination=$(realpath -m "$1") root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/target/peers/fuse3
if ! which meson ninja g++ dpkg-source >/dev/null; then
  echo "installing meson, g++ and dpkg-dev (as root, by apt-get)"
  apt-get update -qq && apt-get install -y -qq meson g++ dpkg-dev
fi
[ -e /usr/include/liburing.h ] && [ -e /usr/include/numa.h ] || {
  echo "installing liburing-dev and libnuma-dev (as root, by apt-get)"
  apt-get update -qq && apt-get install -y -qq liburing-dev libnuma-dev
}
. "$root/bench/private_apt.sh"
private_apt deb-src sid "$work/apt"
rm -rf "$work/source" && mkdir -p "$work/source" && cd "$work/source"
apt-get "${apt_options[@]}" -qq source --download-only fuse3
dpkg-source --extract fuse3_*.dsc source >/dev/null
meson setup build source --buildtype=release --default-library=static -Dutils=false -Dtests=false -Denable-io-uring=true
ninja -C build example/passthrough_hp
install -D build/example/passthrough_hp "$destination"
