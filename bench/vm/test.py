#!/usr/bin/env python3
"""Real guests on real hosts: test.py [--quick] [--kernel c61|c612|c73]... [-v]

In each kernel: the stock driver on our host; our guest on our host through uio and vfio, over ring and virtqueue;
our guest on stock virtiofsd. A boot that dies before user space is tried again, anything else fails."""

import argparse, contextlib, hashlib, pathlib, random, shutil, sys, tempfile, time
from machine import HOST, IOMMU, SPLIT, VIRTIOFSD, CommandFailed, Host, boot, prepare, until

KERNELS = ["c61", "c612", "c73"]
HUGE = "hugepages=90"
# The one file that fio and the host's own checks work on.
FIO = ("fio --name=v --filename={point}/fio --size=8M --ioengine=psync --bsrange=4k-128k --bs_unaligned=0 "
       "--rw=randrw --verify=crc32c --verify_fatal=1 --direct=1 --thread --minimal")


def check(true, what):
    if not true:
        raise CommandFailed(what)


def no_more(now, before):
    return all(a <= b for a, b in zip(now, before))


def fill(share):
    """A tree with all sizes that matter to pages and slots."""
    rng = random.Random(4)
    for i, size in enumerate([0, 1, 4095, 4096, 4097, 65536, 1048575, 1048576, 1048577, 3 << 20]):
        path = share / f"tree/{i % 3}/with space {i % 2}/file-{size}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    for i in range(100):
        (share / f"tree/many-{i}").write_text(str(i))


def digest(top):
    """As `hashes` has it in the guest."""
    files = sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file() and not p.is_symlink())
    return "\n".join(f"{hashlib.sha256((top / f).read_bytes()).hexdigest()}  ./{f}" for f in files)


def hashes(top):
    return f"cd {top} && find . -type f | sort | tr '\\n' '\\0' | xargs -0 sha256sum"


def data(machine, share, point="/mnt"):
    """Files go both ways, intact."""
    check(sorted(machine.run(hashes(f"{point}/tree")).splitlines()) == sorted(digest(share / "tree").splitlines()),
          "the guest reads other files than the host has")
    shutil.rmtree(share / "made", ignore_errors=True)
    made = machine.run(f"""mkdir -p {point}/made/a/b && cd {point}/made
        for n in 1 4095 4096 65537 1048576 2500000; do head -c $n /dev/urandom > a/$n; done
        cp a/4096 a/b/copy; mv a/1 a/b/one; ln a/4096 a/hard; ln -s 4096 a/soft; rm a/65537; truncate -s 100 a/4095
        echo more >> a/b/one; sync; {hashes(point + "/made")}""")
    check(sorted(made.splitlines()) == sorted(digest(share / "made").splitlines()) and (share / "made/a/soft").is_symlink(),
          "the host sees other files than the guest made")
    (share / "from-host").write_text("the host's\n")
    check(machine.run(f"cat {point}/from-host") == "the host's", "the guest does not see the host's new file")
    (share / "from-host").write_text("changed\n")
    check(machine.run(f"cat {point}/from-host") == "changed", "the guest does not see the host's change")
    machine.run(FIO.format(point=point))


class Mounted:
    """`tunnelfs-guest mount` in the guest, of the device with this tag or at this address."""

    def __init__(self, machine, device, expect, *options):
        self.machine = machine
        words = " ".join([f"--pci {device}" if ":" in device else f"--tag {device}", *options])
        out = machine.run(f"""[ -e /sys/module/fuse/parameters/enable_uring ] && echo Y > /sys/module/fuse/parameters/enable_uring
            tunnelfs-guest mount {words} /mnt -f > /tmp/guest.log 2>&1 &
            echo $! > /tmp/guest.pid
            for i in $(seq 100); do grep -q ' mounted: ' /tmp/guest.log && break; [ -d /proc/$(cat /tmp/guest.pid) ] || break; usleep 50000; done
            cat /tmp/guest.log""")
        check(f"{expect} transport" in out, f"wanted {expect}:\n{out}")
        if machine.release.startswith("7.") and "--channel" not in words:
            check("FUSE-over-io_uring" in out, f"no io_uring channel:\n{out}")

    def end(self):
        self.machine.run("for i in $(seq 20); do umount /mnt && break; usleep 200000; done; for i in $(seq 60); do [ -d /proc/$(cat /tmp/guest.pid) ] || exit 0; usleep 50000; done; cat /tmp/guest.log; exit 1")
        driver = self.machine.run("basename $(readlink $(dirname $(grep -l 0x105a /sys/bus/pci/devices/*/device | head -1))/driver)")
        check(driver == "virtio-pci", f"the device was given back to {driver}")


def stress(machine):
    """Compaction moves whatever is not pinned; a fork would take the pages along if they were not kept from it."""
    machine.run(f"""({FIO.format(point='/mnt')} --loops=4 > /tmp/fio.out 2>&1; echo $? > /tmp/fio.rc) &
        for i in $(seq 200); do echo 1 > /proc/sys/vm/compact_memory; (true); [ -s /tmp/fio.rc ] && break; usleep 20000; done
        wait; cat /tmp/fio.out; exit $(cat /tmp/fio.rc)""", timeout=150)
    flags = machine.run("grep -A30 -E '^[0-9a-f]+-' /proc/$(cat /tmp/guest.pid)/smaps | awk '/^[0-9a-f]+-/{n=$0} /^Size:/{s=$2} /^VmFlags/&&s>30000&&/ dc/{print s}'")
    check(flags.strip(), "the pinned memory would be copied by a fork")


def paused(machine, open_file):
    """The VM stands still three times during I/O; what is open stays open."""
    machine.run(f"""exec 5< {open_file}; ({FIO.format(point='/mnt')} --loops=3 > /tmp/fio.out 2>&1; echo $? > /tmp/fio.rc) & sleep 0.3
        (sleep 3; cat <&5 > /tmp/late) &""")
    for _ in range(3):
        machine.pause(0.3)
        time.sleep(0.3)
    machine.run(f"""for i in $(seq 600); do [ -s /tmp/fio.rc ] && break; usleep 50000; done; cat /tmp/fio.out; [ "$(cat /tmp/fio.rc)" = 0 ] || exit 1
        rm /tmp/fio.rc; sleep 3; cmp /tmp/late {open_file}""", timeout=60)


BUSY = "(fio --name=b --filename=/mnt/fio --size=8M --ioengine=psync --bs=64k --rw=randrw --direct=1 --time_based --runtime=30 --thread > /tmp/busy.out 2>&1; echo $? > /tmp/busy.rc) & sleep 1.5;"
# The applications get their errors, and the mount point is free again.
AFTER = """for i in $(seq 100); do [ -s /tmp/busy.rc ] && break; usleep 50000; done
    rc=$(cat /tmp/busy.rc); rm -f /tmp/busy.rc; umount -l /mnt 2>/dev/null
    [ "$rc" -gt 0 ] || { echo "fio ended with '$rc'"; cat /tmp/busy.out; exit 1; }"""
DEVICE = "D=$(basename $(dirname $(grep -l 0x105a /sys/bus/pci/devices/*/device | head -1)));"


def killed(machine):
    machine.run(f"{BUSY} kill -9 $(cat /tmp/guest.pid); {AFTER}", timeout=40)


def unbound(machine):
    machine.run(f"""{DEVICE} {BUSY} echo $D > /sys/bus/pci/devices/$D/driver/unbind; {AFTER}
        for i in $(seq 60); do [ -d /proc/$(cat /tmp/guest.pid) ] || break; usleep 50000; done
        grep -q 'gone away' /tmp/guest.log || {{ cat /tmp/guest.log; exit 1; }}
        echo > /sys/bus/pci/devices/$D/driver_override; [ -e /sys/bus/pci/devices/$D/driver ] || echo $D > /sys/bus/pci/drivers_probe""", timeout=40)


def stock_driver(machine, host, share, quick):
    mount, umount = "modprobe virtiofs 2>/dev/null; mount -t virtiofs ours /mnt", "umount /mnt"
    machine.run(mount)
    data(machine, share)
    step("the VM pauses, stock driver")
    paused(machine, "/mnt/tree/many-7")
    machine.run(umount)
    if quick:
        return
    held = host.holds()
    for _ in range(3):
        machine.run(f"{DEVICE} echo $D > /sys/bus/pci/drivers/virtio-pci/unbind; echo $D > /sys/bus/pci/drivers/virtio-pci/bind; {mount}; ls /mnt >/dev/null; {umount}")
    check(no_more(host.holds(), held), f"the host held {held} descriptors and threads, and {host.holds()} after rebinding")
    machine.run(mount)
    machine.reboot()
    machine.run(mount)
    check(machine.run("cat /mnt/from-host") == "changed", "after a reboot")
    machine.run(umount)


def through(driver, machine, share, quick):
    for transport in ["ring", "virtqueue"]:
        step(f"our guest on our host, {driver}, {transport}")
        mounted = Mounted(machine, "ours", transport, f"--pci-driver {driver}", f"--transport {transport}")
        data(machine, share)
        if transport == "ring" or not quick:
            stress(machine)
            step(f"the VM pauses, {driver}, {transport}")
            paused(machine, "/mnt/tree/many-7")
        mounted.end()
    step(f"our guest on our host, {driver}: killed and unbound under load")
    Mounted(machine, "ours", "ring", f"--pci-driver {driver}")
    killed(machine)
    Mounted(machine, "ours", "ring", f"--pci-driver {driver}")
    unbound(machine)
    mounted = Mounted(machine, "ours", "ring", f"--pci-driver {driver}")
    data(machine, share)
    mounted.end()


def locked_down(machine, share):
    """As with Secure Boot."""
    address = machine.run(f"""mount -t securityfs none /sys/kernel/security; echo integrity > /sys/kernel/security/lockdown
        {DEVICE} echo $D""").splitlines()[-1]
    check("[integrity]" in machine.run("cat /sys/kernel/security/lockdown"), "the kernel does not lock down")
    mounted = Mounted(machine, address, "ring", "--pci-driver vfio")
    data(machine, share)
    mounted.end()
    for words, hint in [("--tag ours", "give its address"), (f"--pci {address} --pci-driver uio", "under kernel lockdown")]:
        refused = machine.run(f"tunnelfs-guest mount {words} /mnt -f 2>&1", check=False)
        check(hint in refused, f"refused without saying what to do:\n{refused}")


def step(what):
    global steps
    steps += 1
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)


def kernel(flavour, share, quick, verbose):
    ours = Host(share, "--num-request-queues", "2", "--cache", "never", "--tag", "ours")
    stock = Host(share, "--cache", "never", program=VIRTIOFSD)
    with ours, stock:
        idle = ours.at_rest()
        # The first virtio-fs device is ours: DEVICE counts on it.
        devices = [*ours.device("ours", queues=2), *stock.device("stock")]
        step(f"{flavour}: boots")
        with boot(flavour, [*SPLIT, *devices], append=HUGE, verbose=verbose, reboots=True) as machine:
            step(f"{machine.release}: stock driver on our host")
            stock_driver(machine, ours, share, quick)
            through("uio", machine, share, quick)
            step("ordinary pages instead of huge ones")
            machine.run("echo 0 > /proc/sys/vm/nr_hugepages")
            mounted = Mounted(machine, "ours", "ring", "--pci-driver uio")
            data(machine, share)
            stress(machine)
            mounted.end()
            step("our guest on stock virtiofsd")
            mounted = Mounted(machine, "stock", "virtqueue")
            data(machine, share)
            mounted.end()
        until(lambda: no_more(ours.holds(), idle), f"the host holds {ours.holds()} instead of {idle} after the VM's end")
        step(f"{flavour} with an IOMMU: boots")
        with boot(flavour, [*IOMMU, *ours.device("ours", queues=2)], append=f"{HUGE} intel_iommu=on", verbose=verbose) as machine:
            through("vfio", machine, share, quick)
            step("locked down, vfio")
            locked_down(machine, share)
        until(lambda: no_more(ours.holds(), idle), f"the host holds {ours.holds()} instead of {idle} after the VM's end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kernel, the main routes")
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    parser.add_argument("-v", "--verbose", action="store_true", help="what the guest prints")
    args = parser.parse_args()
    kernels = args.kernel or (["c73"] if args.quick else KERNELS)
    prepare(kernels)
    steps, start = 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        share = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunnelfs-vm.")))
        fill(share)
        try:
            for flavour in kernels:
                kernel(flavour, share, args.quick, args.verbose)
        except CommandFailed as e:
            sys.exit(f"FAILED: {e}")
    print(f"passed: {steps} steps, kernels {', '.join(kernels)}")
