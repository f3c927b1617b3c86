#!/bin/bash
# initramfs.sh FLAVOUR: target/vm/initramfs/FLAVOUR.gz = busybox, the modules that the tests want, fio, tunnelfs-guest.
set -euo pipefail
flavour=$1 here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)/target/vm
kernel=$root/kernel/$flavour guest=$root/bin/tunnelfs-guest out=$root/initramfs/$flavour.gz
[ "$out" -nt "$guest" ] && [ "$out" -nt "$here/init" ] && [ "$out" -nt "$0" ] && exit 0
release=$(ls "$kernel/lib/modules" | head -1) tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{bin,sbin,proc,sys,dev,tmp,mnt,new,lib64,lib/modules/$release}
cp /bin/busybox "$guest" "$tree/bin/"
for applet in $(busybox --list); do [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"; done
ln -s ../bin/busybox "$tree/sbin/modprobe"
# fio, with the libraries that it is linked with.
cp "$(command -v fio)" "$tree/bin/"
for library in $(ldd "$(command -v fio)" | grep -o '/[^ ]*'); do cp -L --parents "$library" "$tree/"; done
modules="uio_pci_generic vfio-pci vfio_iommu_type1 fuse virtiofs virtio_pci 9p 9pnet_virtio"
for module in $modules; do
  # What is built in has no file, what this flavour lacks no entry.
  modprobe -d "$kernel" -S "$release" --show-depends "$module" 2>/dev/null | awk '/^insmod/{print $2}' || true
done | sort -u | while read -r file; do
  to=$tree/lib/modules/${file#*/lib/modules/}
  mkdir -p "$(dirname "$to")"
  case $file in
  *.xz) xz -dc "$file" >"${to%.xz}" ;;
  *.zst) zstd -dqc "$file" >"${to%.zst}" ;;
  *) cp "$file" "$to" ;;
  esac
done
cp "$kernel/lib/modules/$release"/modules.{order,builtin,builtin.modinfo} "$tree/lib/modules/$release/" 2>/dev/null || true
depmod -b "$tree" "$release"
install -m 755 "$here/init" "$tree/init"
mkdir -p "$(dirname "$out")"
(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) >"$out.part"
mv "$out.part" "$out"
