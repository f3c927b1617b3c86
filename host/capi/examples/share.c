/* A share in two ways: in-process, on memory and eventfds that this program has (as a VMM does), and on a socket.
 *
 *     cc -Ihost/capi/include host/capi/examples/share.c target/debug/libtunnelfs.a \
 *        -lcap-ng -lpthread -ldl -lm -lrt -lutil -lgcc_s -o share
 *     ./share DIRECTORY SOCKET          serves until its standard input ends
 */
#define _GNU_SOURCE
#include "tunnelfs.h"
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

_Static_assert(sizeof(tunnelfs_memory) == 24 && sizeof(tunnelfs_queue) == 48 && sizeof(tunnelfs_statistics) == 32,
               "the layout that the library has");

enum { GUEST = 0x40000000, BYTES = 1 << 20, ENTRIES = 8 };
/* Where things lie in the guest's memory. */
enum { DESCRIPTORS = 0x1000, AVAILABLE = 0x2000, USED = 0x3000, REQUEST = 0x4000, REPLY = 0x5000 };
enum { F_NEXT = 1, F_WRITE = 2 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct available { uint16_t flags, index, ring[ENTRIES]; };
struct used { uint16_t flags, index; struct { uint32_t id, length; } ring[ENTRIES]; };
/* fuse_in_header and fuse_out_header of linux/fuse.h. */
struct request { uint32_t length, opcode; uint64_t unique, node; uint32_t uid, gid, pid, more; uint32_t body[16]; };
struct reply { uint32_t length; int32_t error; uint64_t unique; uint32_t body[62]; };

static char *memory;
static int kick, call;
static uint16_t submitted;

static void check(int bad, const char *what)
{
    if (bad) {
        fprintf(stderr, "share: %s: %s\n", what, tunnelfs_last_error());
        exit(1);
    }
}

/* What the guest's driver and the VMM do: a chain of two descriptors, a kick, and a wait for the interrupt. */
static struct reply *ask(uint32_t opcode, uint64_t node, const void *body, uint32_t length)
{
    struct descriptor *table = (void *)(memory + DESCRIPTORS);
    struct available *available = (void *)(memory + AVAILABLE);
    volatile struct used *used = (void *)(memory + USED);
    struct request *request = (void *)(memory + REQUEST);
    struct pollfd interrupt = { .fd = call, .events = POLLIN };
    *request = (struct request){ .length = 40 + length, .opcode = opcode, .unique = submitted + 1, .node = node };
    memcpy(request->body, body, length);
    table[0] = (struct descriptor){ GUEST + REQUEST, request->length, F_NEXT, 1 };
    table[1] = (struct descriptor){ GUEST + REPLY, sizeof(struct reply), F_WRITE, 0 };
    available->ring[submitted % ENTRIES] = 0;
    submitted++;
    __atomic_store_n(&available->index, submitted, __ATOMIC_SEQ_CST);
    check(eventfd_write(kick, 1), "kick");
    while (__atomic_load_n(&used->index, __ATOMIC_ACQUIRE) != submitted) {
        eventfd_t n;
        check(poll(&interrupt, 1, 60000) != 1, "no interrupt within a minute");
        eventfd_read(call, &n);
    }
    return (void *)(memory + REPLY);
}

static void in_process(const char *directory)
{
    char options[4096];
    snprintf(options, sizeof options, "shared_dir=%s,queues=1,transport=virtqueue", directory);
    kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    tunnelfs_memory region = { GUEST, memory, BYTES };
    tunnelfs_share *share = tunnelfs_in_process(options, &region, 1);
    check(!share, "in-process");
    check(tunnelfs_queues(share) != 2, "a high-priority queue and one for requests");
    tunnelfs_queue queue = { .number = 1, .size = ENTRIES, .descriptors = GUEST + DESCRIPTORS,
        .available = GUEST + AVAILABLE, .used = GUEST + USED, .kick = kick, .call = call };
    check(tunnelfs_start_queue(share, &queue), "queue 1");
    /* A queue outside of the memory is refused, and says so. */
    tunnelfs_queue wrong = queue;
    wrong.number = 0, wrong.used = GUEST + BYTES;
    check(tunnelfs_start_queue(share, &wrong) == 0, "a queue outside of the memory");
    uint32_t init[16] = { 7, 38, 65536 };
    struct reply *reply = ask(26 /* INIT */, 0, init, 64);
    check(reply->error || reply->body[0] != 7, "INIT");
    reply = ask(1 /* LOOKUP */, 1, "hello", 6);
    check(reply->error, "LOOKUP of hello");
    reply = ask(1, 1, "missing", 8);
    check(reply->error != -2, "LOOKUP of what is not there");
    /* The VM is paused, and goes on: the same driver. */
    int next = tunnelfs_stop_queue(share, 1);
    check(next != 3, "stop after three requests");
    queue.next = next;
    check(tunnelfs_start_queue(share, &queue), "queue 1 goes on");
    check(ask(1, 1, "hello", 6)->error, "LOOKUP after a pause");
    tunnelfs_statistics counts;
    check(tunnelfs_get_statistics(share, &counts) || counts.requests != 4 || counts.errors != 1, "statistics");
    check(tunnelfs_reset(share), "reset");
    memset(memory, 0, BYTES);
    submitted = queue.next = 0;
    check(tunnelfs_start_queue(share, &queue), "queue 1 of the next guest");
    check(ask(26, 0, init, 64)->error, "INIT of the next guest");
    tunnelfs_stop(share);
    munmap(memory, BYTES);
    puts("in-process: requests, pause, reset, requests");
}

int main(int argc, char **argv)
{
    char options[4096], byte;
    if (argc != 3)
        return fprintf(stderr, "usage: share DIRECTORY SOCKET\n"), 2;
    in_process(argv[1]);
    snprintf(options, sizeof options, "shared_dir=%s,socket_path=%s,queues=1", argv[1], argv[2]);
    tunnelfs_share *share = tunnelfs_listen(options);
    check(!share, "listen");
    puts("listening");
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        ;
    tunnelfs_statistics counts;
    check(tunnelfs_get_statistics(share, &counts), "statistics");
    tunnelfs_stop(share);
    printf("%llu requests\n", (unsigned long long)counts.requests);
    return 0;
}
