"""Virtual machines and host processes for the tests and benchmarks beside this file."""

import base64, json, os, pathlib, re, shutil, socket, subprocess, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
VM = ROOT / "target/vm"
HOST = ROOT / "target/release/tunnelfs-host"
VIRTIOFSD = ROOT / ".deps/bin/virtiofsd"
SPLIT = ["-M", "q35,memory-backend=ram"]
# With cx16 one boot in ten dies. Emulation copies byte by byte where a real CPU's `rep movsb` is fastest (erms, fsrm):
# without them guest kernels copy by words.
CPU = "max,cx16=off,erms=off,fsrm=off"
# An IOMMU in the guest, for vfio-pci; interrupts need its remapping.
IOMMU = ["-M", "q35,memory-backend=ram,kernel-irqchip=split", "-device", "intel-iommu,intremap=on"]


class BootFailed(Exception):
    """The guest died before its user space ran: emulation does that now and then, so it may be tried again."""


class CommandFailed(Exception):
    pass


def prepare(flavours):
    """Fetches kernels and packs initial file systems, as far as they are not there."""
    (VM / "bin").mkdir(parents=True, exist_ok=True)
    static = ROOT / "target/x86_64-unknown-linux-gnu/release/tunnelfs-guest"
    packed = VM / "bin/tunnelfs-guest"
    if not packed.exists() or packed.stat().st_mtime < static.stat().st_mtime:
        subprocess.run(["strip", "-o", packed, static], check=True)
    for flavour in flavours:
        subprocess.run([ROOT / "bench/vm/kernel.sh", flavour], check=True)
        subprocess.run([ROOT / "bench/vm/initramfs.sh", flavour], check=True)


class Host:
    """A vhost-user back end on a socket: ours, or stock virtiofsd."""

    def __init__(self, share, *options, program=HOST):
        self.dir = tempfile.mkdtemp(prefix="tunnelfs-vm.")
        self.socket = f"{self.dir}/fs.sock"
        self.log = open(f"{self.dir}/log", "w+")
        self.command = [str(program), "--socket-path", self.socket, "--shared-dir", str(share), *options]
        if program == VIRTIOFSD:
            self.command += ["--sandbox", "none", "--log-level", "warn"]
        self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        until(lambda: os.path.exists(self.socket), "the host listens", alive=self.child)

    def device(self, tag, queues=1):
        """QEMU's arguments for a virtio-fs device served by this process."""
        name = f"fs-{tag}"
        many = f",num-request-queues={queues}" if queues > 1 else ""
        return ["-chardev", f"socket,id={name},path={self.socket}",
                "-device", f"vhost-user-fs-pci,chardev={name},tag={tag},queue-size=256{many}"]

    def worker(self):
        """The process that serves: a sandbox's is a child of the one that was started."""
        children = open(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read().split()
        return children[0] if children else self.child.pid

    def holds(self):
        """Its descriptors and threads: what it may not leak."""
        return tuple(len(os.listdir(f"/proc/{self.worker()}/{kind}")) for kind in ("fd", "task"))

    def at_rest(self):
        """What it holds while it waits for a guest: only once it has all its threads."""
        held = None
        while held is None or held[1] == 1 or held != self.holds():
            held = self.holds()
            time.sleep(0.5)
        return held

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()
        self.log.close()
        shutil.rmtree(self.dir)


class Machine:
    """A guest of one of the kernels; `run` executes shell commands in it."""

    def __init__(self, flavour, qemu, append="", memory="1G", cpus=2, boot_timeout=90, verbose=False, reboots=False):
        self.dir = tempfile.mkdtemp(prefix="tunnelfs-vm.")
        self.console = f"{self.dir}/console"
        line = f"{self.dir}/line"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(line)
        listener.listen(1)
        self.command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(cpus),
            "-m", memory, "-object", f"memory-backend-memfd,id=ram,size={memory},share=on",
            "-nodefaults", "-no-user-config", "-display", "none", *([] if reboots else ["-no-reboot"]),
            "-qmp", f"unix:{self.dir}/monitor,server=on,wait=off", "-serial", f"file:{self.console}", "-chardev", f"socket,id=line,path={line}", "-serial", "chardev:line",
            "-kernel", str(VM / f"kernel/{flavour}/vmlinuz"), "-initrd", str(VM / f"initramfs/{flavour}.gz"),
            "-append", f"console=ttyS0 loglevel=4 panic=-1 {append}".strip(), *qemu,
        ]
        self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        listener.settimeout(20)
        self.verbose = verbose
        try:
            self.line, _ = listener.accept()
            self.text = self.line.makefile("r", errors="replace", newline="\n")
            self.line.settimeout(boot_timeout)
            self.release = self.text.readline().removeprefix("ready ").strip()
        except OSError:
            self.release = ""
        finally:
            listener.close()
        if not self.release:
            tail = self.console_tail()
            self.close()
            raise BootFailed(tail)

    def run(self, script, timeout=90, check=True):
        """Runs a script in the guest; its output. One that fails is an error, unless `check` is off."""
        self.line.settimeout(None)
        self.line.sendall(base64.b64encode(script.encode()) + b"\n")
        watchdog = threading.Timer(timeout, self.child.kill)
        watchdog.start()
        lines = []
        try:
            for text in self.text:
                text = text.rstrip("\r\n")
                if text.startswith("@@ "):
                    break
                if self.verbose:
                    print("  |", text, flush=True)
                lines.append(text)
            else:
                raise CommandFailed(f"the guest died or hung in:\n{script}\n{chr(10).join(lines[-40:])}\n{self.console_tail()}")
        finally:
            watchdog.cancel()
        output = "\n".join(lines)
        if check and text != "@@ 0":
            raise CommandFailed(f"{text} from:\n{script}\n{output}\n{self.console_tail()}")
        return output

    def pause(self, seconds):
        """Stops the machine and its devices for a while, as a VMM's user does."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(20)
            line.connect(f"{self.dir}/monitor")
            monitor = line.makefile("rw")
            monitor.readline()
            for command in ["qmp_capabilities", "stop", "cont"]:
                monitor.write(json.dumps({"execute": command}) + "\n")
                monitor.flush()
                # Events come in between.
                while "return" not in json.loads(monitor.readline()):
                    pass
                time.sleep(seconds if command == "stop" else 0)

    def reboot(self):
        """As after a guest's own reset; QEMU and its connection to the host stay."""
        self.line.sendall(base64.b64encode(b"reboot -f") + b"\n")
        self.entered()

    def entered(self):
        """Waits for `init`, which starts once more."""
        watchdog = threading.Timer(60, self.child.kill)
        watchdog.start()
        ready = any(text.startswith("ready ") for text in iter(self.text.readline, ""))
        watchdog.cancel()
        if not ready:
            raise CommandFailed(f"`init` does not start\n{self.console_tail()}")

    def console_tail(self):
        try:
            return "".join(open(self.console, errors="replace").readlines()[-25:])
        except OSError:
            return ""

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def power_off(self):
        """An orderly end."""
        try:
            self.line.sendall(base64.b64encode(b"sync; poweroff -f") + b"\n")
            self.child.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.power_off() if kind is None else self.close()


def boot(*args, attempts=4, **kwargs):
    """A booted machine; what dies before user space is tried again."""
    for attempt in range(attempts):
        try:
            return Machine(*args, **kwargs)
        except BootFailed as e:
            print(f"boot {attempt + 1} failed before user space; again\n{e}" if attempt + 1 < attempts else e, flush=True)
    raise CommandFailed("the guest does not boot")


def until(condition, what, timeout=20, alive=None):
    """Waits for a condition that must come true."""
    end = time.monotonic() + timeout
    while not condition():
        if alive is not None and alive.poll() is not None:
            raise CommandFailed(f"{what}: the process has ended with {alive.returncode}")
        if time.monotonic() > end:
            raise CommandFailed(f"{what}: not within {timeout} s")
        time.sleep(0.02)
