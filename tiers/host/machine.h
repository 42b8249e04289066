/* How much memory this machine, or the control group that we run in, has for us. Any thread. */
#ifndef KVT_HOST_MACHINE_H
#define KVT_HOST_MACHINE_H

#include <stdint.h>

#define KVT_MACHINE_NO_LIMIT UINT64_MAX

struct kvt_machine_memory {
    uint64_t total_bytes;     /* of the machine */
    uint64_t limit_bytes;     /* the tightest limit of our control groups; KVT_MACHINE_NO_LIMIT */
    uint64_t available_bytes; /* could be allocated now without swapping, inside the limit */
};

/* What cannot be read counts as no limit. `root` is put before every path: "" but in tests. */
void kvt_machine_memory(const char *root, struct kvt_machine_memory *out);

/* What the memory of a budget is: that decides which limits of the process hold for it. */
enum kvt_machine_use {
    KVT_MACHINE_FILE,    /* memory files */
    KVT_MACHINE_PRIVATE, /* anonymous mappings */
};

/* Whether a budget can be met at all. -KVT_ECONFIG with a sentence in text[KVT_TEXT_BYTES] that
 * names the numbers; `what` begins it ("host", "device cpu0"), `option` is what to lower. */
int kvt_machine_check_budget(const char *what, const char *option, enum kvt_machine_use use,
                             uint64_t budget_bytes, char *text) __attribute__((warn_unused_result));

/* Whether `bytes` more can be touched now. A courtesy, since others may take the memory meanwhile:
 * it turns most of what the kernel would answer by killing a process into -KVT_ENOMEM. */
int kvt_machine_check_available(const char *what, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

/* Of the NUMA nodes `near` (a bit each), those that have memory; 0: none has, or all nodes with memory
 * are near, so that it makes no difference. `root` as above. */
uint64_t kvt_machine_nodes_near(const char *root, uint64_t near);

/* Raises this process's limit on locked memory so that `bytes` can be pinned. -KVT_ENOMEM with a
 * sentence in text[KVT_TEXT_BYTES] where the hard limit is lower, and we have no CAP_IPC_LOCK. */
int kvt_machine_allow_locked(const char *what, uint64_t bytes, char *text)
    __attribute__((warn_unused_result));

/* "23.5 GiB", "64 KiB", "17 bytes". */
#define KVT_SIZE_TEXT_BYTES 32
const char *kvt_size_text(uint64_t bytes, char text[KVT_SIZE_TEXT_BYTES]);

#endif
