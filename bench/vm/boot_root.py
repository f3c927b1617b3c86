#!/usr/bin/env python3
"""A VM whose root file system is a shared directory: the initial file system mounts it with tunnelfs-guest and goes
over to it; a shell's output from there is shown. boot_root.py [--kernel c73] [--tree DIRECTORY]

Without --tree the directory is made of busybox; any other root file system (debootstrap's) may be given."""

import argparse, os, pathlib, shutil, subprocess, sys, tempfile
from machine import SPLIT, CommandFailed, Host, boot, prepare

# The new root's first process: the tests' own `init`, found where its commands expect it.
SWITCH = """[ -e /sys/module/fuse/parameters/enable_uring ] && echo Y > /sys/module/fuse/parameters/enable_uring
mkdir -p /new && tunnelfs-guest mount --tag root /new || exit 1
for d in proc sys dev tmp; do mkdir -p /new/$d; mount -o move /$d /new/$d; done
# `init` looks for it, and goes over.
echo yes > /new/tmp/switch"""

SHOW = """grep ' / ' /proc/mounts; echo "init: $(cat /proc/1/comm), root: $(ls / | tr '\\n' ' ')"
cat /etc/motd; echo "made by the guest" > /etc/made; uname -sr"""


def busybox_tree(top):
    for folder in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"]:
        (top / folder).mkdir()
    shutil.copy("/bin/busybox", top / "bin/busybox")
    for applet in subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            os.symlink("busybox", top / "bin" / applet)
    (top / "etc/motd").write_text("Hello from a root file system behind TunnelFS.\n")


def main(flavour, tree):
    prepare([flavour])
    with tempfile.TemporaryDirectory(prefix="tunnelfs-root.") as scratch:
        root = pathlib.Path(tree or scratch)
        root.chmod(0o755)
        if not tree:
            busybox_tree(root)
        shutil.copy(pathlib.Path(__file__).with_name("init"), root / "init")
        with Host(root, "--num-request-queues", "2", "--cache", "auto", "--tag", "root") as host:
            with boot(flavour, [*SPLIT, *host.device("root", queues=2)], append="hugepages=80") as machine:
                machine.run(SWITCH)
                machine.entered()
                output = machine.run(SHOW)
        print(output)
        if "fuse.tunnelfs" not in output.splitlines()[0] or (root / "etc/made").read_text() != "made by the guest\n":
            raise CommandFailed("that is not the shared directory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="c73")
    parser.add_argument("--tree", help="a root file system to share; /init and /etc/made are written into it")
    args = parser.parse_args()
    try:
        main(args.kernel, args.tree)
    except CommandFailed as e:
        sys.exit(f"FAILED: {e}")
