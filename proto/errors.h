/* Error codes of kvtierd: one domain for daemon, library and wire.
 *
 * Functions return 0 (or a count) on success and the negative code on failure. On the wire and in
 * replies the positive number travels. Numbers never change meaning; new ones are appended.
 */
#ifndef KVT_PROTO_ERRORS_H
#define KVT_PROTO_ERRORS_H

#ifdef __cplusplus
extern "C" {
#endif

/* X(name, number, text): the text completes "what failed: <text>". */
#define KVT_ERRORS(X)                                                                        \
    X(EINVAL, 1, "an argument is outside its accepted range")                                \
    X(ENOMEM, 2, "out of ordinary process memory")                                           \
    X(EBUSY, 3, "a bounded queue or table is full; finish or close something and try again") \
    X(EQUOTA, 4, "a memory budget is exhausted")                                             \
    X(ENOENT, 5, "no such object")                                                           \
    X(EPROTO, 6, "the message is malformed or out of order")                                 \
    X(EVERSION, 7, "protocol versions do not match")                                         \
    X(EPERM, 8, "not permitted for this user")                                               \
    X(EGONE, 9, "the daemon is gone; attach again")                                          \
    X(EABORTED, 10, "the step was aborted")                                                  \
    X(EFAILED, 11, "the step failed and was not committed")                                  \
    X(ETIMEDOUT, 12, "the deadline passed")                                                  \
    X(EIO, 13, "an input/output error")                                                      \
    X(ETOOBIG, 14, "larger than the protocol's limit")                                       \
    X(ENOTSUP, 15, "not supported by this build or device")                                  \
    X(ESTATE, 16, "not allowed in the current state")                                        \
    X(EEXIST, 17, "already exists")                                                          \
    X(EEVICTED, 18, "the cache was evicted by an administrator")                             \
    X(EDEVICE, 19, "the device reported an error")                                           \
    X(ECONFIG, 20, "the configuration is not usable")                                        \
    X(ESYS, 21, "a system call failed")

/* client/kvtier.h, which stands alone, spells the same list out. */
#ifndef KVT_ERROR_CODES
#define KVT_ERROR_CODES
enum kvt_error {
    KVT_OK = 0,
#define KVT_ERROR_ENUM(name, number, text) KVT_##name = number,
    KVT_ERRORS(KVT_ERROR_ENUM)
#undef KVT_ERROR_ENUM
};
#endif

/* Both are part of libkvtier's public interface, hence the visibility. */

/* The text for a code of either sign; "unknown error" for others. Never NULL. Any thread. */
__attribute__((visibility("default"))) const char *kvt_error_text(int code);

/* The name ("KVT_EQUOTA") for a code of either sign; "KVT_OK" for 0. Never NULL. Any thread. */
__attribute__((visibility("default"))) const char *kvt_error_name(int code);

#ifdef __cplusplus
}
#endif
#endif
