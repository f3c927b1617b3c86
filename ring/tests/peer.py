#!/usr/bin/env python3
"""A second implementation of docs/protocol.md: either end of a queue, for a test.

    peer.py device FD COUNT    takes a hand-off from the socket FD, answers COUNT requests in capitals
    peer.py driver FD COUNT    makes a queue, hands it over on the socket FD, sends COUNT requests and checks the replies

Words of the control part are read and written whole, through a memoryview of u32. Python has no atomics: that suffices on
x86-64, where stores stay in order and a lock is a full fence."""
import fcntl, mmap, os, select, socket, struct, sys, threading

PAGE, NO_SLOT, TIMEOUT = 4096, 0xFFFFFFFF, 20_000
F_ADD_SEALS, F_GET_SEALS, SEAL_SHRINK, SEAL_GROW = 1033, 1034, 2, 4
SQ_HEAD, CQ_HEAD, DEVICE_FLAG, DRIVER_FLAG, SQES = 0, 128, 256, 384, 512
SQE_BYTES, CQE_BYTES, SQE_INLINE, CQE_INLINE = 128, 64, 104, 48


def fence(lock=threading.Lock()):
    with lock:
        pass


class Queue:
    """One end. `out` is the ring that it fills, `into` the one that it empties."""

    def __init__(self, memory, geometry, own, peer, alive, driver):
        self.entries, self.slots, self.slot_size = geometry
        cqes = SQES + SQE_BYTES * self.entries
        self.control = -(-(cqes + CQE_BYTES * self.entries) // PAGE) * PAGE
        self.map = mmap.mmap(memory, self.control + self.slots * self.slot_size)
        self.words = memoryview(self.map).cast("I")
        self.own, self.peer, self.alive = own, peer, alive
        sq, cq = (SQES, SQE_BYTES, SQ_HEAD), (cqes, CQE_BYTES, CQ_HEAD)
        self.out, self.into = (sq, cq) if driver else (cq, sq)
        flags = (DRIVER_FLAG, DEVICE_FLAG) if driver else (DEVICE_FLAG, DRIVER_FLAG)
        self.own_flag, self.peer_flag = (flag // 4 for flag in flags)
        self.tail = self.next = 0

    def push(self, fields, inline):
        start, size, head = self.out
        if (self.tail - self.words[head // 4]) & 0xFFFFFFFF >= self.entries:
            raise SystemExit("the ring is full, or its head out of range")
        at = start + self.tail % self.entries * size
        body = struct.pack(f"<{len(fields)}I", *fields) + inline
        self.map[at + 4 : at + 4 + len(body)] = body
        self.tail = (self.tail + 1) & 0xFFFFFFFF
        self.words[at // 4] = self.tail
        fence()
        if self.words[self.peer_flag]:
            self.words[self.peer_flag] = 0
            os.eventfd_write(self.peer, 1)

    def ready(self):
        start, size, _ = self.into
        return self.words[(start + self.next % self.entries * size) // 4] == (self.next + 1) & 0xFFFFFFFF

    def pop(self):
        """Waits for an entry, and copies it: all but its sequence word. None when the peer has gone."""
        while not self.ready():
            self.words[self.own_flag] = 1
            fence()
            if not self.ready() and not self.sleep():
                return None
            self.words[self.own_flag] = 0
        start, size, head = self.into
        at = start + self.next % self.entries * size
        entry = self.map[at + 4 : at + size]
        self.next = (self.next + 1) & 0xFFFFFFFF
        self.words[head // 4] = self.next
        return entry

    def sleep(self):
        poll = select.poll()
        poll.register(self.own, select.POLLIN)
        poll.register(self.alive, 0)
        events = dict(poll.poll(TIMEOUT))
        if not events:
            raise SystemExit("nothing came in time")
        if self.own in events:
            os.eventfd_read(self.own)
        return self.own in events or self.ready()

    def slot(self, number):
        return self.control + number * self.slot_size


def device(sock, count):
    message, fds, _, _ = socket.recv_fds(sock, 16, 4)
    memory, kick, call, alive = fds
    magic, *geometry = struct.unpack("<4s3I", message)
    assert magic == b"TFH1" and fcntl.fcntl(memory, F_GET_SEALS) & SEAL_SHRINK
    queue = Queue(memory, geometry, kick, call, alive, False)
    for _ in range(count):
        user_data, slot, length, reply_max, inline_len, inline = struct.unpack(f"<5I{SQE_INLINE}s", queue.pop())
        assert slot < queue.slots and max(length, reply_max) <= queue.slot_size and inline_len <= SQE_INLINE
        at = queue.slot(slot)
        queue.map[at : at + length] = queue.map[at : at + length].upper()
        reply = inline[:inline_len].upper()[:CQE_INLINE]
        queue.push((user_data, min(length, reply_max), len(reply)), reply)
    assert queue.pop() is None, "the driver goes, and says nothing more"


def driver(sock, count):
    geometry = (4, 4, PAGE)
    memory = os.memfd_create("peer", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(memory, PAGE + geometry[1] * geometry[2])
    fcntl.fcntl(memory, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW)
    kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    alive, theirs = socket.socketpair()
    queue = Queue(memory, geometry, call, kick, alive.fileno(), True)
    socket.send_fds(sock, [struct.pack("<4s3I", b"TFH1", *geometry)], [memory, kick, call, theirs.fileno()])
    theirs.close()
    for n in range(0, count, 2):
        # Two requests at a time, the second with a message beyond the first cache line.
        for slot in (0, 1):
            text = b"request %d" % (n + slot)
            queue.map[queue.slot(slot) : queue.slot(slot) + len(text)] = text
            message = b"m%d" % slot * (1 + 40 * slot)
            queue.push((slot, slot, len(text), PAGE, len(message)), message)
        for _ in (0, 1):
            slot, length, inline_len, inline = struct.unpack(f"<3I{CQE_INLINE}s", queue.pop())
            at = queue.slot(slot)
            assert queue.map[at : at + length] == b"REQUEST %d" % (n + slot), "payload"
            assert inline[:inline_len] == (b"M%d" % slot * (1 + 40 * slot))[:CQE_INLINE], "message"


if __name__ == "__main__":
    role, fd, count = sys.argv[1:]
    {"device": device, "driver": driver}[role](socket.socket(fileno=int(fd)), int(count))
