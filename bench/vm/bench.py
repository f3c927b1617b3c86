#!/usr/bin/env python3
"""Virtual machines, compared in one boot: bench.py [--rounds N] [--seconds S] [--json FILE] [--report FILE]

Kernel virtiofs on stock virtiofsd and on our host, our guest over ring (spinning and parked host) and over virtqueue,
and 9p; each in turn, N times over; medians. Files are on tmpfs. Interrupts are the guest's own count, kicks the
driver's (our guest's statistics, the kernel's function profiler)."""

import argparse, json, os, pathlib, platform, shlex, statistics, subprocess, sys, tempfile, time
from machine import ROOT, SPLIT, VIRTIOFSD, CommandFailed, Host, boot, prepare

KERNEL = "g73"
SIZE = 64 << 20
# Name, fio's words, and which figure of its report counts.
JOBS = [
    ("4k random read, depth 1", "--rw=randread --bs=4k --ioengine=psync", "iops"),
    ("4k random write, depth 1", "--rw=randwrite --bs=4k --ioengine=psync", "iops"),
    ("4k random read, depth 16", "--rw=randread --bs=4k --ioengine=io_uring --iodepth=16", "iops"),
    ("1M sequential read", "--rw=read --bs=1M --ioengine=psync", "MiB/s"),
    ("1M sequential write", "--rw=write --bs=1M --ioengine=psync", "MiB/s"),
]
FIO = "fio --name=j --filename=/mnt/file --size={size} --direct=1 --thread --time_based --runtime={seconds} --output-format=json {words}"
FILES = ("fio --name=m --directory=/mnt/files --nrfiles=1000 --openfiles=1 --filesize=4k --fallocate=none --create_on_open=1 "
         "--filename_format='f.$filenum' --thread --output-format=json --ioengine=file{what}")
META = ["create", "stat", "delete"]
INTERRUPTS = "awk '/virtio|uio_pci/{for(i=2;i<=NF&&$i~/^[0-9]+$/;i++)n+=$i} END{print n+0}' /proc/interrupts"
# The kernel driver's kicks; nothing where the profiler is missing.
KICKS = "awk '/vp_notify/{n+=$2} END{print n+0}' /sys/kernel/tracing/trace_stat/function* 2>/dev/null || echo 0"
PROFILE = """mount -t tracefs none /sys/kernel/tracing 2>/dev/null; cd /sys/kernel/tracing &&
    echo 'vp_notify*' > set_ftrace_filter && echo 1 > function_profile_enabled; true"""
OURS = r"""kill -USR1 $(pidof tunnelfs-guest); usleep 200000; tac /tmp/guest.log | awk '/ kicks$/{n+=$(NF-1)} /^queue 0:/{exit} END{print n+0}'"""


class Way:
    """A way to the files."""

    def __init__(self, name, mount, kicks=KICKS):
        self.name, self.mount, self.kicks = name, mount, kicks

    def run(self, machine, args):
        machine.run(self.mount + " && ls /mnt > /dev/null")
        rows = {}
        for name, words, unit in JOBS:
            command = FIO.format(size=SIZE, seconds=args.seconds, words=words)
            rows[name] = self.measure(machine, command, lambda job: self.rate(job, unit))
            print(f"  {name}: {rows[name]['value']:.4g} {unit}", flush=True)
        machine.run("mkdir -p /mnt/files; rm -f /mnt/files/*")
        for what in META:
            command = FILES.format(what=what)
            # Whole time by a thousand: fio's own latency leaves out what its engine does around.
            rows[f"{what} of 1000 files"] = self.measure(machine, command, lambda job: (job["job_runtime"] / 1000, "ms each"))
            print(f"  {what}: {rows[f'{what} of 1000 files']['value']:.4g} ms each", flush=True)
        machine.run("cd /; umount /mnt; for i in $(seq 60); do pidof tunnelfs-guest > /dev/null || exit 0; usleep 50000; done; exit 1")
        return rows

    @staticmethod
    def rate(job, unit):
        side = max(job["read"], job["write"], key=lambda s: s["total_ios"])
        return (side["iops"], unit) if unit == "iops" else (side["bw_bytes"] / (1 << 20), unit)

    def measure(self, machine, command, figure):
        out = machine.run(f"{INTERRUPTS}; {self.kicks}; {command}; echo; {INTERRUPTS}; {self.kicks}", timeout=120)
        head, rest = out.split("{", 1)
        body, tail = rest.rsplit("}", 1)
        before, after = head.split()[:2], tail.split()[:2]
        job = json.loads("{" + body + "}")["jobs"][0]
        if job["error"]:
            raise CommandFailed(f"{self.name}: {command}: error {job['error']}")
        ops = max(1, job["read"]["total_ios"] + job["write"]["total_ios"]) if "filename=" in command else 1000
        value, unit = figure(job)
        per_op = [(int(b) - int(a)) / ops for a, b in zip(before, after)]
        return {"value": value, "unit": unit, "interrupts_per_op": per_op[0], "kicks_per_op": per_op[1]}


def ours(tag, options):
    return (f"tunnelfs-guest mount --tag {tag} /mnt -f --num-request-queues 1 {options} > /tmp/guest.log 2>&1 & "
            "for i in $(seq 100); do grep -q ' mounted: ' /tmp/guest.log && break; usleep 50000; done; grep -q ' mounted: ' /tmp/guest.log")


def main(args):
    prepare([KERNEL])
    with tempfile.TemporaryDirectory(prefix="tunnelfs-vm.", dir="/dev/shm") as share:
        pathlib.Path(share, "file").write_bytes(os.urandom(SIZE))
        common = ["--cache", "never"]
        stock = Host(share, *common, program=VIRTIOFSD)
        hosts = {tag: Host(share, *common, "--tag", tag, "--num-request-queues", "1", *more) for tag, more in
                 [("ours", []), ("spin", ["--wait", "spin"]), ("park", ["--wait", "park"]), ("vq", ["--transport", "virtqueue"])]}
        devices = stock.device("stock")
        for tag, host in hosts.items():
            devices += host.device(tag)
        devices += ["-fsdev", f"local,id=fs9,path={share},security_model=none", "-device", "virtio-9p-pci,fsdev=fs9,mount_tag=nine"]
        ways = [
            Way("virtiofs on virtiofsd", "mount -t virtiofs stock /mnt"),
            Way("virtiofs on tunnelfs-host", "mount -t virtiofs ours /mnt"),
            Way("ring, spinning host", ours("spin", "--wait auto"), OURS),
            Way("ring, parked host", ours("park", "--wait auto"), OURS),
            Way("virtqueue", ours("vq", "--transport virtqueue"), OURS),
            Way("9p", "mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=none nine /mnt"),
        ]
        qemu = [*SPLIT, *devices]
        rounds = {way.name: [] for way in ways}
        with boot(KERNEL, qemu, append="hugepages=60", memory="2G") as machine:
            machine.run("modprobe virtiofs; modprobe 9p; modprobe 9pnet_virtio; echo Y > /sys/module/fuse/parameters/enable_uring; " + PROFILE, check=False)
            command = machine.command
            for n in range(args.rounds):
                for way in ways:
                    print(f"round {n + 1} of {args.rounds}: {way.name}", flush=True)
                    rounds[way.name].append(way.run(machine, args))
            release = machine.release
        record(args, rounds, command, [stock.command, *(h.command for h in hosts.values())], release)
        for host in [stock, *hosts.values()]:
            host.__exit__()


def record(args, rounds, command, hosts, release):
    rows = []
    for name, runs in rounds.items():
        for op in runs[0]:
            row = {"way": name, "op": op, "unit": runs[0][op]["unit"]}
            for key in ["value", "interrupts_per_op", "kicks_per_op"]:
                row[key] = round(statistics.median(run[op][key] for run in runs), 4)
            rows.append(row)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hide = lambda words: shlex.join(str(w).replace(str(ROOT) + "/", "") for w in words)
    result = {
        "command": shlex.join(["bench/vm/bench.py", *sys.argv[1:]]), "commit": commit, "kernel": platform.release(),
        "guest_kernel": release, "cpus": os.cpu_count(), "accelerator": "tcg", "rounds": args.rounds,
        "qemu": hide(command), "hosts": [hide(h) for h in hosts], "rows": rows,
    }
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    if args.report:
        pathlib.Path(args.report).write_text(text)
    print(text)


def report(result):
    ways = list(dict.fromkeys(r["way"] for r in result["rows"]))
    at = {(r["way"], r["op"]): r for r in result["rows"]}
    lines = ["# A guest under QEMU", "", f"Guest {result['guest_kernel']}, {result['accelerator'].upper()} on {result['cpus']} CPUs, "
             f"medians of {result['rounds']} interleaved rounds, `{result['command']}`, commit {result['commit']}. "
             "Under emulation the guest's own work is some ten times dearer than on hardware.", ""]

    def table(title, cell):
        lines.extend([f"## {title}", "", "| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"])
        for op in dict.fromkeys(r["op"] for r in result["rows"]):
            lines.append(f"| {op} | " + " | ".join(cell(at[way, op], at[ways[0], op]) for way in ways) + " |")
        lines.append("")

    def rate(row, first):
        ratio = row["value"] / first["value"] if first["value"] else 0
        if row["unit"].startswith("ms"):
            ratio = first["value"] / row["value"] if row["value"] else 0
        return f"{row['value']:.4g} {row['unit']} ({ratio:.2f})"

    table("Rates (and how many times as fast as kernel virtiofs on virtiofsd)", rate)
    table("Interrupts / kicks per operation", lambda r, _: f"{r['interrupts_per_op']:.3f} / {r['kicks_per_op']:.3f}")
    lines += ["## Command lines", "", "```", result["qemu"], *result["hosts"], "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--report")
    try:
        main(parser.parse_args())
    except CommandFailed as e:
        sys.exit(f"FAILED: {e}")
