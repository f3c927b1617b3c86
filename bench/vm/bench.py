#!/usr/bin/env python3
"""Virtual machines, compared in one boot: bench.py [--rounds N] [--seconds S] [--json FILE] [--report FILE]

Kernel virtiofs on stock virtiofsd and on our host (with one request queue, as stock has, and with two), our guest over
ring (undecided, spinning and parked host) and over virtqueue, and 9p; each in turn, N times over; medians. Files are on
tmpfs. Interrupts and kicks are counted in a round of their own before the others: the guest's interrupts are its
kernel's count, kicks our guest's own or those that a probe sees in its kernel's driver."""

import argparse, contextlib, json, os, pathlib, platform, re, shlex, statistics, subprocess, sys, tempfile, time
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
PROBE = "/sys/kernel/tracing/events/kprobes/kick/enable"
KICKS = "awk '$1 == \"kick\"{print $2}' /sys/kernel/tracing/kprobe_profile"
OURS = r"""kill -USR1 $(pidof tunnelfs-guest); usleep 200000; tac /tmp/guest.log | awk '/ kicks$/{n+=$(NF-1)} /^queue 0:/{exit} END{print n+0}'"""
SET_UP = """modprobe virtiofs; modprobe 9p; modprobe 9pnet_virtio; mount -t tracefs none /sys/kernel/tracing
echo p:kick vp_notify > /sys/kernel/tracing/kprobe_events
echo Y > /sys/module/fuse/parameters/enable_uring"""
UNMOUNT = "cd /; umount /mnt; for i in $(seq 60); do pidof tunnelfs-guest > /dev/null || exit 0; usleep 50000; done; exit 1"


def say(text):
    print(f"{time.monotonic() - START:6.1f} s  {text}", flush=True)


class Way:
    """A way to the files: what the guest mounts, and whether that is our guest."""

    def __init__(self, name, mount, ours=False):
        self.name, self.mount, self.ours = name, mount, ours

    def run(self, machine, args, counting):
        """One round; its rows."""
        start = self.mount
        if self.ours:
            start += (" > /tmp/guest.log 2>&1 & for i in $(seq 100); do grep -q ' mounted: ' /tmp/guest.log && break; usleep 50000; done; "
                      "grep -q ' mounted: ' /tmp/guest.log || { cat /tmp/guest.log; exit 1; }")
        machine.run(f"{start} && ls /mnt > /dev/null")
        rows, seconds = {}, 1 if counting else args.seconds
        for name, words, unit in JOBS:
            if re.search(args.rows, name):
                command = FIO.format(size=SIZE, seconds=seconds, words=words)
                rows[name] = self.measure(machine, command, counting, lambda job: self.rate(job, unit))
        machine.run("mkdir -p /mnt/files; rm -f /mnt/files/*")
        for what in META:
            # All of them or none: each works on the last one's files.
            name = f"{what} of 1000 files"
            if re.search(args.rows, "files"):
                # Whole time by a thousand: fio's own latency leaves out what its engine does around.
                rows[name] = self.measure(machine, FILES.format(what=what), counting, lambda job: (job["job_runtime"] / 1000, "ms each"))
        if args.verbose and self.ours:
            print(machine.run("kill -USR1 $(pidof tunnelfs-guest); usleep 200000; cat /tmp/guest.log"))
        machine.run(UNMOUNT)
        figures = [f"{row['interrupts_per_op']:.2f}/{row['kicks_per_op']:.2f}" if counting else f"{row['value']:.4g}" for row in rows.values()]
        say(f"{self.name}: {', '.join(figures)}")
        return rows

    @staticmethod
    def rate(job, unit):
        side = max(job["read"], job["write"], key=lambda s: s["total_ios"])
        return (side["iops"], unit) if unit == "iops" else (side["bw_bytes"] / (1 << 20), unit)

    def measure(self, machine, command, counting, figure):
        count = f"{INTERRUPTS}; {OURS if self.ours else KICKS}" if counting else "true"
        out = machine.run(f"{count}; {command}; echo; {count}", timeout=60)
        head, rest = out.split("{", 1)
        body, tail = rest.rsplit("}", 1)
        job = json.loads("{" + body + "}")["jobs"][0]
        if job["error"]:
            raise CommandFailed(f"{self.name}: {command}: error {job['error']}")
        value, unit = figure(job)
        row = {"value": value, "unit": unit}
        if counting:
            ops = max(1, job["read"]["total_ios"] + job["write"]["total_ios"]) if "filename=" in command else 1000
            counts = [(int(after) - int(before)) / ops for before, after in zip(head.split(), tail.split())]
            row["interrupts_per_op"], row["kicks_per_op"] = counts
        return row


class Bench:
    """The hosts, and the machine that has a device of each."""

    def __init__(self, share):
        self.share = share
        ours = "tunnelfs-guest mount --tag {} /mnt -f".format
        self.ways = [
            Way("virtiofs on virtiofsd", "mount -t virtiofs stock /mnt"),
            Way("virtiofs on tunnelfs-host", "mount -t virtiofs ours /mnt"),
            Way("the same, two queues", "mount -t virtiofs two /mnt"),
            Way("ring", ours("auto"), ours=True),
            Way("ring, spinning host", ours("spin"), ours=True),
            Way("ring, parked host", ours("park"), ours=True),
            Way("virtqueue", ours("vq") + " --transport virtqueue", ours=True),
            Way("9p", "mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=none nine /mnt"),
        ]
        self.stack, self.machine, self.boots, self.command, self.release = contextlib.ExitStack(), None, 0, [], ""
        self.hosts = {}

    def start_hosts(self):
        start = lambda *options, **more: self.stack.enter_context(Host(self.share, "--cache", "never", *options, **more))
        self.hosts = {"stock": start(program=VIRTIOFSD)}
        queues = dict(stock=1, ours=1, two=2, auto=2, spin=2, park=2, vq=2)
        more = dict(spin=["--wait", "spin"], park=["--wait", "park"], vq=["--transport", "virtqueue"])
        for tag in list(queues)[1:]:
            self.hosts[tag] = start("--tag", tag, "--num-request-queues", str(queues[tag]), *more.get(tag, []))
        for tag, host in self.hosts.items():
            yield from host.device(tag, queues[tag])

    def booted(self, append):
        if self.machine is None:
            qemu = [*SPLIT, *self.start_hosts(), "-fsdev", f"local,id=fs9,path={self.share},security_model=none",
                    "-device", "virtio-9p-pci,fsdev=fs9,mount_tag=nine"]
            self.machine = boot(KERNEL, qemu, append=append, memory="2G")
            self.boots += 1
            self.command, self.release = self.machine.command, self.machine.release
            self.machine.run(SET_UP, check=False)
            clock = self.machine.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
            say(f"{self.release} runs, clock: {clock}")
        return self.machine

    def round(self, args, counting, results):
        """Each way once. What fails costs its row of this round, and a boot."""
        for way in self.ways:
            if not re.search(args.ways, way.name):
                continue
            try:
                machine = self.booted(args.append)
                machine.run(f"echo {int(counting)} > {PROBE}")
                for op, row in way.run(machine, args, counting).items():
                    results.setdefault((way.name, op), []).append(row)
            except CommandFailed as e:
                say(f"FAILED: {way.name}: {e}")
                self.close()

    def close(self):
        if self.machine is not None:
            self.machine.close()
            self.machine = None
        self.stack.close()

    def shown(self, words):
        """A command line, without this run's folders."""
        text = shlex.join(map(str, words))
        for tag, host in self.hosts.items():
            text = text.replace(host.socket, f"{tag}.sock")
        folder = os.path.dirname(next((w.split("file:")[1] for w in self.command if "file:" in w), "/none/none"))
        for this, name in [(str(ROOT) + "/", ""), (str(self.share), "SHARE"), (folder, "RUN")]:
            text = text.replace(this, name)
        return text


def main(args):
    prepare([KERNEL])
    with tempfile.TemporaryDirectory(prefix="tunnelfs-vm.", dir="/dev/shm") as share, contextlib.ExitStack() as stack:
        pathlib.Path(share, "file").write_bytes(os.urandom(SIZE))
        bench = Bench(share)
        stack.callback(bench.close)
        counts, rates, done, longest = {}, {}, 0, 0.0
        if not args.no_counts:
            say("counting interrupts and kicks")
            bench.round(args, True, counts)
        while done < args.rounds and (done == 0 or time.monotonic() - START + longest < args.limit):
            begin = time.monotonic()
            say(f"round {done + 1} of {args.rounds}: {'; '.join([name for name, _, _ in JOBS] + META)}")
            bench.round(args, False, rates)
            done, longest = done + 1, max(longest, time.monotonic() - begin)
        result = gather(bench, args, counts, rates, done)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    if args.report:
        pathlib.Path(args.report).write_text(text)
    print(text)
    if not result["rows"]:
        raise CommandFailed("nothing could be measured")


def gather(bench, args, counts, rates, rounds):
    rows = []
    for (way, op), runs in rates.items():
        values = [round(run["value"], 4) for run in runs]
        row = {"way": way, "op": op, "unit": runs[0]["unit"], "rounds": len(runs), "values": values, "value": round(statistics.median(run["value"] for run in runs), 4)}
        for key in ["interrupts_per_op", "kicks_per_op"]:
            row[key] = next((round(run[key], 4) for run in counts.get((way, op), [])), None)
        rows.append(row)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(["bench/vm/bench.py", *sys.argv[1:]]), "commit": commit, "kernel": platform.release(),
        "guest_kernel": bench.release, "cpus": os.cpu_count(), "accelerator": "tcg", "rounds": rounds, "boots": bench.boots,
        "qemu": bench.shown(bench.command),
        "hosts": [bench.shown(host.command) for host in bench.hosts.values()],
        "guest": {way.name: way.mount for way in bench.ways},
        "loads": [FIO.format(size=SIZE, seconds=args.seconds, words=words) for _, words, _ in JOBS] + [FILES.format(what=what) for what in META],
        "rows": rows,
    }


def plain(value):
    """Four digits that count, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def report(result):
    ways = list(dict.fromkeys(r["way"] for r in result["rows"]))
    at = {(r["way"], r["op"]): r for r in result["rows"]}
    lines = ["# A guest under QEMU", "", f"Guest {result['guest_kernel']}, {result['accelerator'].upper()} on {result['cpus']} CPUs, "
             f"medians of {result['rounds']} interleaved rounds in {result['boots']} boot(s), `{result['command']}`, commit {result['commit']}. "
             "Under emulation the guest's own work is some ten times dearer than on hardware.", ""]

    def table(title, cell):
        lines.extend([f"## {title}", "", "| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"])
        for op in dict.fromkeys(r["op"] for r in result["rows"]):
            cells = [cell(at[way, op], at.get((ways[0], op))) if (way, op) in at else "failed" for way in ways]
            lines.append(f"| {op} | " + " | ".join(cells) + " |")
        lines.append("")

    def rate(row, first):
        text = f"{plain(row['value'])} {row['unit']}"
        if not first or not first["value"] or not row["value"]:
            return text
        faster = row["value"] / first["value"]
        return f"{text} ({1 / faster if row['unit'].startswith('ms') else faster:.2f})"

    def counts(row, _):
        shown = [row["interrupts_per_op"], row["kicks_per_op"]]
        return "-" if None in shown else "{:.3f} / {:.3f}".format(*shown)

    table(f"Rates (and how many times as fast as {ways[0] if ways else 'the first'})", rate)
    table("Interrupts / kicks per operation", counts)
    lines += ["## Command lines", "", "Hosts, the machine, what the guest mounts, and its loads:", "", "```", *result["hosts"], "",
              result["qemu"], "", *(f"# {name}\n{mount}" for name, mount in result["guest"].items()), "", *result["loads"], "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="of each of fio's jobs")
    parser.add_argument("--limit", type=int, default=900, help="seconds after which no further round begins")
    parser.add_argument("--ways", default="", help="only the ways whose name has this pattern")
    parser.add_argument("--rows", default="", help="only the rows whose name has this pattern")
    parser.add_argument("--no-counts", action="store_true", help="count no interrupts and kicks")
    parser.add_argument("--append", default="hugepages=100", help="words for the guest's kernel")
    parser.add_argument("-v", "--verbose", action="store_true", help="our guest's statistics")
    parser.add_argument("--json")
    parser.add_argument("--report")
    START = time.monotonic()
    try:
        main(parser.parse_args())
    except CommandFailed as e:
        sys.exit(f"FAILED: {e}")
