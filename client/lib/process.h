/* Whether this is the process that made the client, asked in every call: so without a system call.
 *
 * A page of its own, which the kernel hands to a forked child zeroed (MADV_WIPEONFORK). Unlike a
 * handler of pthread_atfork it also sees a fork that went past the C library, and leaves nothing
 * behind when the library is closed with dlclose. Thread: any.
 */
#ifndef KVT_CLIENT_PROCESS_H
#define KVT_CLIENT_PROCESS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

struct kvt_client_process {
    pid_t pid;
    const uint32_t *mark; /* 1 here, 0 in a child; NULL: the kernel has no such pages */
};

void kvt_client_process_init(struct kvt_client_process *p);
/* In a child too. */
void kvt_client_process_free(struct kvt_client_process *p);

static inline bool kvt_client_process_is_this(const struct kvt_client_process *p) {
    return p->mark != NULL ? *p->mark != 0 : p->pid == getpid();
}

#endif
