/* TunnelFS's host as a library: shares a directory with a guest, on a socket or inside a VMM.
 *
 * Any thread may call any function, but tunnelfs_stop() only when no other call with that share is under way or comes.
 * A function that fails returns NULL or -1, and tunnelfs_last_error() says why and what to do.
 *
 * docs/embedding.md tells step by step what a VMM calls when. */
#ifndef TUNNELFS_H
#define TUNNELFS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One shared directory. */
typedef struct tunnelfs_share tunnelfs_share;

/* A piece of the guest's memory, as this process has it mapped: whole pages of one MAP_SHARED mapping, readable and
 * writable. The library maps the same pages once more, and leaves this mapping as it is. */
typedef struct tunnelfs_memory {
    uint64_t guest_address;
    void *start;
    size_t length;
} tunnelfs_memory;

/* A virtqueue as the guest's driver has set it up. */
typedef struct tunnelfs_queue {
    uint32_t number;      /* 0: high priority; 1 and up: requests */
    uint16_t size;        /* entries */
    uint16_t next;        /* 0 for a new driver; for one that was paused, what tunnelfs_stop_queue() returned */
    uint64_t descriptors; /* guest addresses */
    uint64_t available;
    uint64_t used;
    uint32_t event_idx;   /* 1 if the driver has taken VIRTIO_RING_F_EVENT_IDX */
    int kick;             /* eventfd: signalled when the guest notifies the device */
    int call;             /* eventfd: signalled by the library for an interrupt */
} tunnelfs_queue;

/* What a share has done so far. */
typedef struct tunnelfs_statistics {
    uint64_t requests;
    uint64_t errors;    /* requests that were answered with an error: a name that does not exist, say */
    uint64_t bytes_in;  /* payload of requests */
    uint64_t bytes_out; /* payload of replies */
} tunnelfs_statistics;

/* Shares a directory on a UNIX socket, to vhost-user front ends (a VMM, tunnelfs-guest). It installs signal handlers for
 * SIGBUS and SIGRTMIN+6, the latter only if the program has none. options: comma-separated, by
 * the names of tunnelfs.toml: "shared_dir=/srv,socket_path=/run/x.sock,cache=never"; "config=FILE" first for a file. */
tunnelfs_share *tunnelfs_listen(const char *options);

/* A virtio-fs device for one guest inside this process, without a signal handler or any other change of the process.
 * The memory must stay mapped until tunnelfs_stop(). options: as above; queues=N request queues. */
tunnelfs_share *tunnelfs_in_process(const char *options, const tunnelfs_memory *memory, size_t count);

/* The virtio feature bits that such a device has, VIRTIO_F_VERSION_1 among them. */
uint64_t tunnelfs_features(void);

/* The number of queues of such a device, the high-priority one among them. */
int tunnelfs_queues(const tunnelfs_share *share);

/* Starts a queue. The descriptors are duplicated: they stay the caller's. */
int tunnelfs_start_queue(tunnelfs_share *share, const tunnelfs_queue *queue);

/* Stops a queue, and waits for its requests in flight, at most 5 seconds. Returns where the device would go on, for
 * tunnelfs_queue.next when the same driver goes on; -1 when it fails. */
int tunnelfs_stop_queue(tunnelfs_share *share, uint32_t number);

/* The guest has reset the device or has rebooted: stops all queues, and forgets what it had open. */
int tunnelfs_reset(tunnelfs_share *share);

int tunnelfs_get_statistics(const tunnelfs_share *share, tunnelfs_statistics *out);

/* Ends the share and all of its threads; NULL does nothing. */
void tunnelfs_stop(tunnelfs_share *share);

/* The calling thread's last error; valid until its next call. */
const char *tunnelfs_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
