#!/bin/bash
# kernel.sh FLAVOUR: unpacks a Debian kernel under target/vm/kernel/FLAVOUR; the system itself is not touched.
#   c61 (bookworm, 6.1) | c612 (bookworm-backports, 6.12) | c73 (trixie-backports, 7.3) | g73 (the same, with all drivers)
# From the mirror that this machine's apt sources name, through a private apt state.
set -euo pipefail
flavour=$1 root=$(cd "$(dirname "$0")/../.." && pwd)/target/vm
case $flavour in
c61) suite=bookworm package=linux-image-cloud-amd64 ;;
c612) suite=bookworm-backports package=linux-image-cloud-amd64 ;;
c73) suite=trixie-backports package=linux-image-cloud-amd64 ;;
g73) suite=trixie-backports package=linux-image-amd64 ;;
*) echo "kernel.sh: unknown flavour $flavour" >&2; exit 2 ;;
esac
kernel=$root/kernel/$flavour
[ -e "$kernel/vmlinuz" ] && exit 0
apt=$root/apt/$flavour
rm -rf "$kernel"
mkdir -p "$apt/debs" "$kernel"
. "$root/../../bench/private_apt.sh"
private_apt deb "$suite" "$apt"
depends() { apt-cache "${apt_options[@]}" depends "$@" 2>/dev/null | awk '/Depends:/{print $2}'; }
# The meta package names the image's packages; those of newer kernels name their parts.
packages=$(depends "$package" | grep '^linux-')
parts=$(depends $packages | grep -E '^linux-(image|binary|modules|base)-[0-9]' || true)
cd "$apt/debs"
for p in $(printf '%s\n' $packages $parts | sort -u); do
  apt-get "${apt_options[@]}" -qq download "$p"
  dpkg -x "$(ls -t "${p}"_*.deb | head -1)" "$kernel"
done
# Newer packages have everything under /usr.
[ -e "$kernel/lib" ] || ln -s usr/lib "$kernel/lib"
release=$(ls "$kernel/lib/modules" | head -1)
depmod -b "$kernel" "$release" 2>/dev/null
image=$kernel/boot/vmlinuz-$release
[ -e "$image" ] || image=$kernel/lib/modules/$release/vmlinuz
ln -s "${image#"$kernel/"}" "$kernel/vmlinuz"
rm -rf "$apt/debs"
